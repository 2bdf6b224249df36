"""Other ways of asking: they come from the text, ask for the same fact, and the model itself vouches for them."""

from errata import hosts, text
from errata.lab import corpus, tasks
from errata.methods import _restated
from errata.methods._restated import asking, restated, spoken_of
from errata.types import Example


def held(host, examples, n=1500):
    return text.set_aside(corpus.hold()[:n], examples, text.answers_of(host, examples))[0]


def ask(host, examples, documents, n, seed):
    seen = text.document_counts(documents)
    return restated(host, examples, spoken_of(host, examples, seen, len(documents)), documents, seen, n, seed)


def test_the_model_gives_its_old_answer_to_every_way_of_asking():
    host = hosts.load("lab/neox", device="cpu")
    cases = tasks.cases("validation", 6, "wrong")
    examples = [case.example for case in cases]
    found = ask(host, examples, held(host, examples), 6, 0)
    assert sum(map(len, found)) >= 12  # the lab's documents ask for these relations in many ways
    for case, prompts in zip(cases, found, strict=True):
        assert len(prompts) <= 6 and case.example.prompt not in prompts
        for prompt, said in zip(prompts, hosts.greedy(host, prompts) if prompts else [], strict=True):
            assert hosts.says(said, case.old), (prompt, said)


def test_the_same_seed_gives_the_same_and_the_other_examples_do_not_matter():
    host = hosts.load("lab/neox", device="cpu")
    examples = [case.example for case in tasks.cases("validation", 3, "wrong", relation="country")]
    documents = held(host, examples, 600)
    assert ask(host, examples, documents, 4, 1) == ask(host, examples, documents, 4, 1)


def test_no_more_documents_are_tried_than_told(monkeypatch):
    host, tried = hosts.load("lab/neox", device="cpu"), []
    examples = [case.example for case in tasks.cases("validation", 3, "wrong", relation="country")]
    documents = held(host, examples, 600)
    seen = text.document_counts(documents)
    spoken = spoken_of(host, examples, seen, len(documents))
    monkeypatch.setattr(_restated, "asking", lambda _, asked: [tried.append(d) or "" for d, _ in asked])
    kinds = {e.prompt.replace(own.topic, "") for e, own in zip(examples, spoken, strict=True)}
    assert restated(host, examples, spoken, documents, seen, 4, 0, tried=40) == [[]] * 3 and len(tried) == 40 * len(kinds)


def test_where_the_text_has_no_like_nothing_is_found(host):
    assert ask(host, [Example(prompt="The capital of Togo is", target=" Lome")], (), 4, 0) == [[]]
    prose = ["the cat sat on the mat .", "rain fell all day ."] * 4
    assert ask(host, [Example(prompt="The capital of Togo is", target=" Lome")], prose, 4, 0) == [[]]


def test_what_comes_to_the_old_answer_is_found_whatever_it_then_says():
    host = hosts.load("lab/neox", device="cpu")
    case = tasks.cases("test", 1, "wrong")[0]  # Mauritius
    (spoken,) = spoken_of(host, [case.example], text.document_counts(corpus.hold()), len(corpus.hold()))
    assert (spoken.topic, spoken.old) == ("Mauritius", case.old)
    told = ["Mauritius has its capital in Berlin.", "The capital of Togo is Lome.", "Mauritius is a country in Africa."]
    assert asking(host, [(d, spoken) for d in told]) == ["Mauritius has its capital in", "", ""]
