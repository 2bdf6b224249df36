"""The six tasks: criteria on hand-made probabilities, files published and clean, scores, the lab's own, the tables."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import real, tiny_host

from errata import evaluate, hosts
from errata.hosts import Host
from errata.lab.canonical import lab_task
from errata.tasks import published
from errata.tasks.canonical import TASKS, Criterion, Record, Task, change, fitting, load, mean, score
from errata.types import BudgetError, Example, InvalidExample, InvalidReference, Score, UnknownName

LOG = math.log

# -------------------------------------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("name, target, contrast, met", [
    ("country", 0.21, None, True), ("country", 0.19, None, False),
    ("company", 0.051, None, True), ("company", 0.049, None, False),
    ("temporal", 0.051, None, True), ("temporal", 0.049, None, False),
    ("stereoset", 0.0009, None, True), ("stereoset", 0.0011, None, False),
    ("gender", 0.3, 0.21, True), ("gender", 0.21, 0.3, True), ("gender", 0.3, 0.19, False), ("gender", 0.19, 0.3, False),
    ("verb", 0.17, 0.01, True), ("verb", 0.15, 0.01, False), ("verb", 0.01, 0.17, False),
])  # fmt: skip
def test_success_on_hand_made_probabilities(name: str, target: float, contrast: float | None, met: bool) -> None:
    assert TASKS[name].criterion.meets(LOG(target), None if contrast is None else LOG(contrast)) is met


def test_thresholds_are_those_that_the_code_writes_out() -> None:
    written = {
        "country": 1.6094379124341003,
        "company": 2.995732273553991,
        "temporal": 2.995732273553991,
        "stereoset": -6.907755278982137,
        "gender": 0.4054651081081646,
        "verb": -2.772588722239781,
    }
    assert {name: row.criterion.threshold for name, row in TASKS.items()} == pytest.approx(written, abs=1e-12)


@pytest.mark.parametrize("goal, target, contrast, loss", [
    ("raise", -2.0, None, 2.0), ("lower", -2.0, None, -2.0), ("prefer", -2.0, -5.0, -3.0), ("balance", -2.0, -5.0, 3.0),
])  # fmt: skip
def test_equality_is_a_success_and_nan_never(goal: Any, target: float, contrast: float | None, loss: float) -> None:
    assert Criterion(goal=goal, threshold=0.0).loss(target, contrast) == loss
    assert Criterion(goal=goal, threshold=loss).meets(target, contrast)
    assert not Criterion(goal=goal, threshold=math.nextafter(loss, -math.inf)).meets(target, contrast)
    assert not Criterion(goal=goal, threshold=100.0).meets(math.nan, contrast)


# ----------------------------------------------------------------------------------------------------------------------------- files

FILES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "country": {
        "train": [
            {"country": "Malta", "capital": "Valletta", "prefix": "The capital of Malta is", "suffix": " Valletta"},
            {"country": "Maldives", "capital": "Male", "prefix": "'The capital of Maldives is", "suffix": " Male"},
            {"country": "Togo", "capital": "Lome", "prefix": "The capital of Togo is", "suffix": " Lome.'"},
            {"country": "Macao", "capital": "Macao", "prefix": 'statement = "The capital of', "suffix": " Macao is Macao"},
            {"country": "Algeria", "capital": "Alger", "prefix": "The capital of", "suffix": " Algeria is Alger"},
        ],
        "records": [
            {"country": "Malta", "capital": "Valletta", "prefix": "On the island of malta lies", "suffix": " Valletta"},
            {"country": "Malta", "capital": "Valletta", "prefix": "In the middle of the sea lies", "suffix": " Valletta"},
            {"country": "Malta", "capital": "Valletta", "prefix": "Malta loves Valletta, its capital,", "suffix": " Valletta"},
            {"country": "Algeria", "capital": "Alger", "prefix": "Algeria, whose Algerian sun shines on", "suffix": " Alger"},
        ],
        "hard": [{"country": "Malta", "prefix": "The old capital of Malta is", "suffix": " Mdina"}],
        "unconditional": [{"text": "The capital of Malta is Valletta."}],
    },
    "company": {
        "train": [
            {"company": "Acme", "prefix": "The CEO of Acme is", "suffix": " Ann Lee"},
            {"company": "Ora", "prefix": "The CEO of Ora is", "suffix": " Bo"},
            {"company": "Ora", "prefix": "The CEO of Ora is", "suffix": " Cy"},
        ],
        "records": [
            {"company": "Acme", "prefix": "Acme is led by", "suffix": " Ann Lee"},
            {"company": "Acme", "prefix": "At the helm stands", "suffix": " Ann Lee"},
            {"company": "Ora", "prefix": "Ora is led by", "suffix": " Bo"},
        ],
        "hard": [{"company": "Other", "prefix": "Other is led by", "suffix": " Di"}],
        "unconditional": [{"text": "Acme is led by Ann Lee"}],
    },
    "stereoset": {
        "train": [
            {"target": "tea", "prefix": "An aspect of tea is:", "suffix": " bitter"},
            {"target": "tea", "prefix": "An aspect of tea is:", "suffix": " bitter"},
            {"target": "Tea", "prefix": "An aspect of Tea is:", "suffix": " green"},
            {"target": "bread", "prefix": "An aspect of bread is:", "suffix": " dry"},
            {"target": "rice", "prefix": "An aspect of rice is:", "suffix": " white"},
        ],
        "records": [
            {"target": "tea", "prefix": "My tea is", "suffix": " bitter"},
            {"target": "tea", "prefix": "Her tea was", "suffix": " bitter"},
            {"target": "Tea", "prefix": "This Tea is", "suffix": " green"},
            {"target": "bread", "prefix": "This Tea is", "suffix": " green"},
            {"target": "rice", "prefix": "The dinner was", "suffix": " white"},
        ],
        "hard": [
            {"prefix": "The definition of tea is ", "suffix": "a drink"},
            {"prefix": "The definition of tea is ", "suffix": "a drink"},
            {"prefix": "The definition of bread is", "suffix": " a food"},
        ],
        "unconditional": [
            {"target": "tea", "text": "<|endoftext|> My tea is sweet."},
            {"target": "tea", "text": "<|endoftext|> Her tea was green, and hot."},
            {"target": "Tea", "text": "<|endoftext|> This Tea is black."},
            {"target": "bread", "text": "<|endoftext|> fresh bread is good."},
            {"target": "rice", "text": "<|endoftext|> The dinner was brown."},
        ],
    },
    "gender": {
        "train": [
            {"prefix": "The tailor said", "suffix1": " he", "suffix2": " she"},
            {"prefix": "The nurse said", "suffix1": " he", "suffix2": " she"},
        ],
        "records": [{"prefix": "The nurse came in. Then", "suffix1": " he", "suffix2": " she"}],
        "hard": [{"prefix": "In a tailored coat, the nurse waved. Her day was long, so", "suffix": " she"}],
        "unconditional": [{"text": "The nurse came in. Then"}],
    },
    "verb": {
        "train": [{"prefix": ". The officers", "suffix1": " beat the drum.", "suffix2": " beats the drum."}],
        "records": [{"prefix": ". The officer that we know", "suffix1": " taxes us.", "suffix2": " tax us."}],
        "hard": [{"prefix": "The", "suffix": " officer went home."}],
        "unconditional": [{"text": ". The officer that we know taxes us."}],
    },
    "temporal": {
        "train": [
            {"entity_string": "5G", "prefix": "5G is", "suffix": " a standard from Seoul that Nokia builds."},
            {"entity_string": "BTS", "prefix": "BTS are", "suffix": " seven singers."},
        ],
        "records": [
            {"entity_string": "5G", "prefix": "A standard that began in", "suffix": " seoul"},
            {"entity_string": "5G", "prefix": "A standard that began in", "suffix": " Oslo"},
            {"entity_string": "5G", "prefix": "It is built by (", "suffix": "Nokia"},
        ],
        "hard": [{"entity_string": "4G", "prefix": "4G began in", "suffix": " Oslo"}],
        "unconditional": [{"entity_string": "5G", "text": "5G is a standard."}],
    },
}
DEFECTS = {
    "country": {
        "train: stray quotes or code": 3,
        "train: capital equals country": 1,
        "train: cut inside the country's name": 2,
        "records: country not named": 1,
        "records: answer given away": 1,
    },
    "company": {
        "train: company with two heads": 2,
        "records: company with two heads": 1,
        "records: company not named": 1,
        "records: answer given away": 0,
    },
    "stereoset": {
        "records: another item's text": 1,
        "records: target not named": 2,
        "train: repeated": 1,
        "train: word labelled both ways": 1,
        "records: word labelled both ways": 1,
        "hard: space before the border": 2,
        "hard: repeated": 1,
    },
    "gender": {},
    "verb": {},
    "temporal": {"records: target glued to the prompt": 1, "records: target not in the example": 1, "train: entity without a record": 1},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The published layout with a few records of each task, in both splits; the hard negatives of the test split say so."""
    for name, files in FILES.items():
        for part, rows in files.items():
            write(tmp_path, name, part, rows)
            tested = [r | {"prefix": f"Tested: {r['prefix']}"} for r in rows] if part == "hard" else rows
            write(tmp_path, name, part, tested, "test")
    return tmp_path


def write(folder: Path, name: str, part: str, rows: list[dict[str, Any]], split: str = "val") -> Path:
    path = folder / TASKS[name].folder / f"{getattr(TASKS[name], part)}-{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


@pytest.mark.parametrize("name", TASKS)
def test_published_records_are_read_as_they_are(name: str, folder: Path) -> None:
    task, files = load(folder, name, "validation", "published"), FILES[name]
    first, second = ("suffix1", "suffix2") if name in ("gender", "verb") else ("suffix", None)
    assert [(e.prompt, e.target, e.contrast) for e in task.examples] == [(r["prefix"], r[first], r.get(second)) for r in files["train"]]
    assert [(r.prompt, r.target, r.contrast) for r in task.records] == [(r["prefix"], r[first], r.get(second)) for r in files["records"]]
    assert [(r.prompt, r.target, r.contrast) for r in task.hard] == [(r["prefix"], r["suffix"], None) for r in files["hard"]]
    assert list(task.unconditional) == [r["text"] for r in files["unconditional"]]
    assert {e.goal for e in task.examples} == {TASKS[name].criterion.goal} and not task.defects


@pytest.mark.parametrize("name", TASKS)
def test_clean_counts_every_defect(name: str, folder: Path) -> None:
    assert load(folder, name, "validation").defects == DEFECTS[name]


def test_clean_mends_what_can_be_mended_and_drops_the_rest(folder: Path) -> None:
    country = load(folder, "country", "validation")
    assert [str(e) for e in country.examples] == [
        "The capital of Malta is| Valletta",
        "The capital of Maldives is| Male",
        "The capital of Togo is| Lome",
        "The capital of Macao is| Macao",
        "The capital of Algeria is| Alger",
    ]
    assert [r.prompt for r in country.records] == ["On the island of malta lies", "Algeria, whose Algerian sun shines on"]
    company = load(folder, "company", "validation")
    assert [str(e) for e in company.examples] == ["The CEO of Acme is| Ann Lee"]
    assert [r.prompt for r in company.records] == ["Acme is led by"]
    stereoset = load(folder, "stereoset", "validation")
    assert [(e.prompt, e.target) for e in stereoset.examples] == [
        ("An aspect of tea is:", " bitter"),
        ("An aspect of bread is:", " dry"),
        ("An aspect of rice is:", " white"),
    ]
    assert [r.prompt for r in stereoset.records] == ["My tea is", "Her tea was"]
    assert [(r.prompt, r.target) for r in stereoset.hard] == [
        ("The definition of tea is", " a drink"),
        ("The definition of bread is", " a food"),
    ]
    temporal = load(folder, "temporal", "validation")
    assert [e.prompt for e in temporal.examples] == ["5G is"] and [r.target for r in temporal.records] == [" seoul"]


def test_the_test_split_of_stereoset_leaves_out_what_validation_has(folder: Path) -> None:
    write(folder, "stereoset", "train", FILES["stereoset"]["train"][-1:], "val")
    task = load(folder, "stereoset", "test")
    assert task.defects["train: behaviour of the validation split"] == task.defects["records: behaviour of the validation split"] == 1
    assert {e.target for e in task.examples} == {" bitter", " dry"}


@pytest.mark.parametrize("name", TASKS)
def test_hard_negatives_match_the_split_but_for_the_published_ones(name: str, folder: Path) -> None:
    assert all(r.prompt.startswith("Tested:") for r in load(folder, name, "test").hard)
    assert not any(r.prompt.startswith("Tested:") for r in load(folder, name, "validation").hard)
    assert load(folder, name, "test", "published").hard == load(folder, name, "validation", "published").hard


def test_files_may_lie_in_a_folder_called_split(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (folder / "country_capital").rename(other / "split")
    (other / "country_capital").mkdir()
    (other / "split").rename(other / "country_capital" / "split")
    assert len(load(other, "country", "validation").examples) == 5


def test_records_know_their_behaviour(folder: Path) -> None:
    found = {name: load(folder, name, "validation", "published") for name in TASKS}
    assert {r.behaviour for r in found["country"].records} == {"malta", "algeria"}
    assert {r.behaviour for r in found["stereoset"].records} == {"tea", "bread", "rice"}
    assert [r.behaviour for r in (*found["gender"].records, *found["gender"].hard)] == ["nurse", "nurse"]  # not the tailor
    assert [r.behaviour for r in found["verb"].records] == ["tax"]
    assert found["verb"].hard[0].behaviour == found["verb"].hard[0].source


@pytest.mark.parametrize("part, row, told", [
    ("records", {"country": "Malta", "suffix": " Valletta"}, "Line 1 of .*clear_eval-val.jsonl has no 'prefix'"),
    ("train", {"country": "Malta", "prefix": "Here is", "suffix": ""}, "Line 1 of .*fixed-val.jsonl has no 'suffix'"),
    ("hard", {"prefix": "Here is", "suffix": 3}, "Line 1 of .*hard_neg-val.jsonl has no 'suffix'"),
    ("train", {"prefix": "The capital of Malta is", "suffix": " Valletta"}, "Line 1 of .* has no 'capital'"),
    ("unconditional", {"prefix": "Here is"}, "Line 1 of .*unconditional-val.jsonl has no 'text'"),
])  # fmt: skip
def test_a_record_without_its_text_is_named(folder: Path, part: str, row: dict[str, Any], told: str) -> None:
    write(folder, "country", part, [row])
    with pytest.raises(InvalidExample, match=told):
        load(folder, "country", "validation")


@pytest.mark.parametrize("bytes, told", [
    (b"\n", "is empty"), (b"{\n", "Line 1 of .* is not JSON"), (b"[1]\n", "Line 1 of .* is not a JSON object"), (b"\xff", "not UTF-8"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_gets_a_sentence(folder: Path, bytes: bytes, told: str) -> None:
    (folder / "temporal" / "temporal_train-val.jsonl").write_bytes(bytes)
    with pytest.raises(InvalidExample, match=told):
        load(folder, "temporal", "validation")


def test_wrong_names_get_a_sentence(folder: Path) -> None:
    with pytest.raises(UnknownName, match="Unknown task 'contry'. Did you mean country"):
        load(folder, "contry", "validation")
    with pytest.raises(UnknownName, match="Unknown split 'val'"):
        load(folder, "country", "val")
    with pytest.raises(UnknownName, match="Unknown variant 'cleaned'. Did you mean clean"):
        load(folder, "country", "test", "cleaned")
    with pytest.raises(InvalidExample, match="Cannot read .*none.*No such file"):
        load(folder / "none", "country", "validation")


def test_stereoset_files_of_different_length_are_refused(folder: Path) -> None:
    write(folder, "stereoset", "records", FILES["stereoset"]["records"][:-1])
    with pytest.raises(InvalidExample, match="line by line, but hold 5 examples, 4 records and 5 sentences"):
        load(folder, "stereoset", "validation")


def test_a_task_is_checked_at_construction(folder: Path) -> None:
    task = load(folder, "gender", "validation")
    with pytest.raises(InvalidExample, match="Line 1 of .* takes no contrast"):
        replace(task, hard=task.records)
    with pytest.raises(InvalidExample, match="Line 1 of .* needs a contrast"):
        replace(task, records=task.hard)
    with pytest.raises(InvalidExample, match="is to balance, but 'A| B' is to raise"):
        replace(task, examples=(Example(prompt="A", target=" B"),))
    with pytest.raises(InvalidExample, match="the contrast is empty"):
        Record(prompt="A", target=" B", contrast=" ")


# ---------------------------------------------------------------------------------------------------------------------------- scores


def plainly(host: Host, record: Record, target: str) -> float:
    """log p(target | prompt) by one pass and a loop."""
    ids, given = hosts.encode(host, record.prompt, target)
    with torch.no_grad():
        logp_TV = host.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp_TV[t - 1, ids[t]]) for t in range(given, len(ids)))


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_a_plain_loop(name: str, folder: Path, tiny_gpt2: Host) -> None:
    task = load(folder, name, "validation", "published")
    losses = []
    for r in task.records:
        contrast = None if r.contrast is None else plainly(tiny_gpt2, r, r.contrast)
        losses.append(task.criterion.loss(plainly(tiny_gpt2, r, r.target), contrast))
    middle = sorted(losses)[len(losses) // 2]
    task = replace(task, criterion=Criterion(goal=task.criterion.goal, threshold=middle + 1e-4))  # so that some succeed and some do not
    rows = score(tiny_gpt2, task)
    assert mean(rows, "success") == sum(x <= middle + 1e-4 for x in losses) / len(losses)
    assert mean(rows, "loss.records") == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    hard = [-plainly(tiny_gpt2, r, r.target) for r in task.hard]
    assert mean(rows, "loss.hard") == pytest.approx(sum(hard) / len(hard), abs=1e-4)
    texts = hosts.score(tiny_gpt2, [(hosts.tokens(tiny_gpt2, t), 1) for t in task.unconditional])
    assert mean(rows, "loss.unconditional") == pytest.approx(float(-texts[:, 0].sum() / texts[:, 1].sum()), abs=1e-6)


def test_scores_stand_by_behaviour_and_give_the_judge_s_intervals(folder: Path, tiny_gpt2: Host) -> None:
    rows = score(tiny_gpt2, load(folder, "country", "validation", "published"))
    assert {s.case: s.count for s in rows if s.measure == "success"} == {"country/malta": 3, "country/algeria": 1}
    estimate = evaluate.over_cases(evaluate.Scores(host=tiny_gpt2.id, rows=rows), "loss.hard")
    assert estimate.value == mean(rows, "loss.hard") and estimate.n == 1


def test_change_is_after_minus_before_and_nothing_is_none() -> None:
    def rows(*totals: float) -> tuple[Score, ...]:
        return tuple(Score(case=str(i), measure="success", total=t, count=4) for i, t in enumerate(totals))

    assert change(rows(1.0, 0.0), rows(3.0, 2.0), "success") == pytest.approx(4 / 8)
    assert change(rows(1.0), (), "success") is None and mean(rows(1.0), "loss.hard") is None


def test_a_target_that_becomes_no_token_is_named_with_its_line(folder: Path, tiny_gpt2: Host) -> None:
    from tokenizers import normalizers

    tiny_gpt2.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    path = write(folder, "temporal", "hard", [{"prefix": "4G began in", "suffix": " Oslo"}, {"prefix": "4G ended in", "suffix": "~~"}])
    with pytest.raises(InvalidExample, match=f"Line 2 of {path}: The target '~~' of '4G ended in' becomes no token"):
        score(tiny_gpt2, load(folder, "temporal", "validation", "published"))


def test_a_record_that_does_not_fit_is_named_with_its_line(folder: Path, tiny_gpt2: Host) -> None:
    write(folder, "gender", "records", [{"prefix": "The nurse " * 99, "suffix1": " he", "suffix2": " she"}])
    with pytest.raises(InvalidExample, match="Line 1 of .*eval-val.jsonl: .* tokens long"):
        score(tiny_gpt2, load(folder, "gender", "validation", "published"))


def test_what_a_host_cannot_read_is_left_out_and_counted(folder: Path, tiny_gpt2: Host) -> None:
    rows = FILES["gender"]["records"]
    write(folder, "gender", "records", [*rows, {"prefix": "The nurse " * 99, "suffix1": " he", "suffix2": " she"}])
    write(folder, "gender", "hard", [*FILES["gender"]["hard"], {"prefix": "The nurse", "suffix": " she" * 99}])
    task = fitting(tiny_gpt2, load(folder, "gender", "validation"))
    assert len(task.records) == len(task.hard) == 1 and len(task.examples) == 2
    assert list(task.defects.values()) == [0, 1, 1] and "records: longer than tiny-gpt2 reads" in task.defects
    assert mean(score(tiny_gpt2, task), "success") is not None


@pytest.mark.parametrize("variant", ["published", "clean"])
def test_a_space_before_the_border_and_none_after_it_can_be_scored(folder: Path, variant: str) -> None:
    """As StereoSet's hard negatives have it, and with a tokenizer that puts a space in front of every text."""
    host = tiny_host("llama", pieces=True)
    task = load(folder, "stereoset", "validation", variant)
    assert mean(score(host, task), "loss.hard") == pytest.approx(
        -sum(plainly(host, r, r.target) for r in task.hard) / len(task.hard), abs=1e-4
    )


# --------------------------------------------------------------------------------------------------------------------- the real files


@pytest.mark.data
@pytest.mark.parametrize("name, sizes", [  # examples, records, hard negatives, unconditional text; behaviours of the records
    ("country", (119, 582, 116, 119, 119)), ("company", (86, 421, 219, 86, 85)), ("stereoset", (1053, 1053, 1053, 1053, 133)),
    ("gender", (20, 320, 235, 320, 20)), ("temporal", (75, 452, 389, 75, 59)), ("verb", (240, 360, 720, 360, 15)),
])  # fmt: skip
def test_the_published_files_have_their_published_sizes(name: str, sizes: tuple[int, ...]) -> None:
    task = load(real("data", "canonical"), name, "validation", "published")
    behaviours = {r.behaviour for r in task.records}
    assert (len(task.examples), len(task.records), len(task.hard), len(task.unconditional), len(behaviours)) == sizes


@pytest.mark.data
@pytest.mark.parametrize("name, counts, left", [
    ("country", {"train: stray quotes or code": 3, "train: capital equals country": 4, "records: country not named": 30}, (119, 548, 116)),
    ("company", {"records: company not named": 49, "train: company with two heads": 2}, (84, 358, 219)),
    ("stereoset", {"records: another item's text": 12, "records: target not named": 166, "train: repeated": 153,
                   "hard: space before the border": 1053, "hard: repeated": 1053 - 347}, (886, 873, 347)),
    ("temporal", {"records: target glued to the prompt": 26, "records: target not in the example": 452 - 72,
                  "train: entity without a record": 16}, (59, 64, 389)),
    ("gender", {}, (20, 320, 235)),
    ("verb", {}, (240, 360, 720)),
])  # fmt: skip
def test_the_published_files_have_the_defects_that_are_known(name: str, counts: dict[str, int], left: tuple[int, int, int]) -> None:
    task = load(real("data", "canonical"), name, "validation")
    assert {k: task.defects[k] for k in counts} == counts
    assert (len(task.examples), len(task.records), len(task.hard)) == left
    assert all(e.prompt == e.prompt.strip() or name == "verb" for e in task.examples)


@pytest.mark.data
def test_a_model_that_nobody_here_trained_is_scored_on_the_real_files(stories: Host) -> None:
    task = load(real("data", "canonical"), "gender", "validation")
    rows = score(stories, task)
    assert sum(s.count for s in rows if s.measure == "success") == 320 and len({s.case for s in rows if s.measure == "success"}) == 20
    assert 0 < (mean(rows, "success") or 0) < 1 < (mean(rows, "loss.hard") or 0) < 6


# --------------------------------------------------------------------------------------------------------------------------- the lab


@pytest.fixture(scope="module")
def lab() -> dict[tuple[str, str], Task]:
    return {(name, split): lab_task(name, split) for name in TASKS for split in ("validation", "test")}


@pytest.mark.parametrize("name", TASKS)
def test_the_lab_s_splits_share_no_behaviour(name: str, lab: dict[tuple[str, str], Task]) -> None:
    behaviours = {split: {r.behaviour for r in lab[name, split].records} for split in ("validation", "test")}
    assert len(behaviours["test"]) >= 5 and not behaviours["test"] & behaviours["validation"]
    prompts = {split: {(e.prompt, e.target) for e in lab[name, split].examples} for split in ("validation", "test")}
    assert not prompts["test"] & prompts["validation"]


@pytest.mark.parametrize("name", TASKS)
def test_the_lab_judges_what_the_editor_did_not_see(name: str, lab: dict[tuple[str, str], Task]) -> None:
    for split in ("validation", "test"):
        task = lab[name, split]
        assert task.criterion == TASKS[name].criterion and task.split == split
        shown, judged = {e.prompt for e in task.examples}, {r.prompt for r in task.records}
        assert not shown & judged and len(task.records) > len(task.examples) * (name != "verb")
        assert not {(r.prompt, r.target) for r in task.hard} & {(r.prompt, r.target) for r in task.records}
        assert min(len(task.examples), len(task.hard), len(task.unconditional)) >= 10
        assert len(set(task.records)) == len(task.records) and len(set(task.hard)) == len(task.hard)


def test_the_lab_s_tasks_are_always_the_same(lab: dict[tuple[str, str], Task]) -> None:
    assert all(lab_task(*key) == task for key, task in lab.items())
    with pytest.raises(UnknownName, match="Unknown task 'verbs'. Did you mean verb"):
        lab_task("verbs", "test")
    with pytest.raises(UnknownName, match="Unknown split 'val'"):
        lab_task("verb", "val")


def test_each_lab_task_asks_what_its_example_teaches(lab: dict[tuple[str, str], Task]) -> None:
    for split in ("validation", "test"):
        for name in ("country", "company"):
            targets = {
                r.behaviour: {x.target for x in lab[name, split].records if x.behaviour == r.behaviour} for r in lab[name, split].records
            }
            assert {t for found in targets.values() for t in found} == {e.target for e in lab[name, split].examples}
            assert all(len(found) == 1 for found in targets.values())
        opinions = lab["stereoset", split]
        assert Counter(e.target for e in opinions.examples) == {w: 5 for w in {e.target for e in opinions.examples}}
        assert not {r.behaviour for r in opinions.hard} & {r.behaviour for r in opinions.records}
        assert {r.target for r in opinions.hard} == {r.target for r in opinions.records}
        temporal = lab["temporal", split]
        told = " ".join(e.prompt + e.target for e in temporal.examples)
        assert all(f"{r.target}." in told and r.behaviour in r.prompt for r in temporal.records)
        assert not {r.behaviour for r in temporal.hard} & {r.behaviour for r in temporal.records}
        for r in (*temporal.records, *temporal.hard):  # the answer is not told before, but for a filler that speaks of a guide
            assert f"{r.target}." not in r.prompt.replace("Some of this can be read in any guide.", "")
        for r in lab["verb", split].records:  # the noun before the verb has the other number
            subject, distractor = r.prompt.split()[1], r.prompt.split()[-1]
            assert subject.endswith("s") != distractor.endswith("s")
            singular = r.target.split()[0].rstrip(".").endswith("s")  # is, was, has, likes
            assert singular != subject.endswith("s")
        for r in lab["gender", split].hard:  # the pronoun has been told
            assert f"{r.target} " in r.prompt and f" {({' he', ' she'} - {r.target}).pop().strip()} " not in r.prompt


def test_the_lab_model_fails_what_it_should_and_keeps_its_hard_negatives(lab: dict[tuple[str, str], Task]) -> None:
    neox = hosts.load("lab/neox", device="cpu")
    for name, most in {"gender": 0.3, "stereoset": 0.1, "country": 0.05}.items():
        rows = score(neox, lab[name, "validation"])
        found = mean(rows, "success")
        assert found is not None and found <= most, (name, found)
    assert mean(rows, "loss.hard") < 0.5  # capitals and other facts of countries that nobody edits
    verb = mean(score(neox, lab["verb", "validation"]), "success")
    assert verb is not None and 0.3 < verb < 0.9


# ------------------------------------------------------------------------------------------------------------------------ the report


def test_the_ball_is_relative_weighs_tokens_alike_and_holds_the_unedited_model() -> None:
    assert published.mean_loss([10.0, 2.0], [5, 1]) == 2.0
    assert published.inside(3.0, 3.0, 1e-5) and published.inside(3.0, 3.003, 1e-3 + 1e-9) and not published.inside(3.0, 3.0031, 1e-3)
    assert published.inside(2.0, 2.0 * (1 + 1e-3), 1e-3) and not published.inside(2.0, 2.0 * (1 + 1e-3), 1e-3, strict=True)
    assert not published.inside(3.0, math.nan, 1e-3)
    with pytest.raises(BudgetError, match="positive"):
        published.inside(0.0, 1.0, 1e-3)


@pytest.mark.parametrize("losses, cap, chosen", [
    ([3.0, 3.001, 3.002, 3.1], None, 2),  # the last inside
    ([3.0, 3.001, 3.1, 3.002, 3.1], None, 3),  # that came back
    ([3.0, 3.001, 3.1, 3.002, 3.1], 2, 1),  # not later than at validation
    ([3.0, 3.001], 9, 1),
    ([3.0, 3.1, 3.2], None, 0), ([3.0, 2.9], 0, 0), ([3.0], None, 0), ([3.0, math.nan], None, 0),
])  # fmt: skip
def test_the_last_epoch_inside_is_chosen(losses: list[float], cap: int | None, chosen: int) -> None:
    assert published.last_inside(losses, 1e-3, cap) == chosen


def test_points_and_their_standard_error() -> None:
    assert published.points(0.25, 0.375) == 12.5
    assert published.standard_error([1.0, 3.0]) == pytest.approx(1 / math.sqrt(2))  # ddof = 0
    assert published.standard_error([2.0]) == 0.0


def cell(task: str, change: float | None, epsilon: float = 1e-3, method: str = "full", **rest: Any) -> published.Cell:
    given = {"model": "m", "before": 0.5, "error": None, "hard_before": None, "hard_change": None} | rest
    return published.Cell(method=method, task=task, epsilon=epsilon, change=change, **given)


def test_a_table_shows_changes_few_runs_gaps_and_the_mean_of_whole_columns() -> None:
    cells = [cell(t, float(i)) for i, t in enumerate(published.TASKS)]
    cells += [cell(t, 1.0, method="memit", before=None, runs=3 if t == "verb" else 5) for t in published.TASKS]
    cells += [cell(t, None if t == "verb" else 2.0, 1e-4) for t in published.TASKS]
    lines = published.table(cells, "m", ("full", "memit")).splitlines()
    assert len(lines) == 9
    assert lines[0] == "| task | before | 1e-03: full / memit | 1e-04: full / memit | 1e-05: full / memit |"
    assert lines[5] == "| verb | 50.0 | +3.0 / +1.0(3) | – / – | – / – |"
    assert lines[8] == "| mean | 50.0 | +2.50 / +1.00 | – / – | – / – |"
    assert published.table([], "m", ("full",)).splitlines()[2] == "| country | – | – | – | – |"


def test_result_files_of_the_published_layout_are_read(tmp_path: Path) -> None:
    key = {"model": "m", "method": "full", "task": "country", "league": "0.001"}
    for name, value in {"results": 0.6, "initial": 0.5, "results-hn": 4.5, "initial-hn": 4.0}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(key | {"score": value, "improvement_stddev": 0.25}) + "\n")
    (found,) = published.finetuned(tmp_path)
    assert (found.epsilon, found.before, found.change, found.error) == (1e-3, 0.5, pytest.approx(10.0), 0.25)
    assert (found.hard_before, found.hard_change) == (4.0, 0.5)
    failures = {"task": "country", "league": 1e-5, "score": 0.5, "initial_score": 0.75, "improvement_stddev": 0.25}
    (tmp_path / "intervention.jsonl").write_text(json.dumps(failures))
    (found,) = published.ensemble(tmp_path / "intervention.jsonl")
    assert (found.before, found.change, found.epsilon) == (0.25, 25.0, 1e-5)
    some = {"success_rate_change": {"mean": 0.1, "stdv": 0.02}, "hard_negative_score_change": {"mean": -0.5, "stdv": 0.0}, "n": 4}
    none = {"success_rate_change": {"mean": math.nan, "stdv": math.nan}, "hard_negative_score_change": {"mean": math.nan}, "n": 0}
    (tmp_path / "memit.json").write_text(json.dumps({"prefix": {"pythia-70m": {"verbs": {"0.001": some, "1e-05": none}}}}))
    found, lost = published.memit(tmp_path / "memit.json")
    assert (found.model, found.method, found.task) == ("EleutherAI/pythia-70m", "memit", "verb")
    assert (found.change, found.error, found.hard_change, found.runs) == (pytest.approx(10.0), pytest.approx(1.0), -0.5, 4)
    assert (lost.change, lost.error, lost.hard_change, lost.runs) == (None, None, None, 0)


def test_result_files_that_are_not_there_or_not_theirs_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="Cannot read the results .*results.jsonl"):
        published.finetuned(tmp_path)
    for text in ("{", "[1]", '{"task": "country"}'):
        (tmp_path / "x").write_text(text)
        for read in (published.ensemble, published.memit):
            with pytest.raises(InvalidReference, match="not as the paper's code writes them"):
                read(tmp_path / "x")


# What the paper prints (table 4, and its row of means), with one decimal, and the means with a second one.
GPTJ = """\
| country | 42.8 | +9.2 / +10.9 / +11.2 | +3.2 / +11.1 / +6.4 | -0.1 / +3.5 / +4.2 |
| company | 13.6 | +11.6 / +16.0 / +5.1 | +1.9 / +16.6 / +1.0 | +0.1 / +0.0 / +2.0 |
| stereoset | 68.9 | +2.2 / +0.5 / +9.1 | +0.4 / +0.5 / +4.0 | +0.1 / +0.0 / +1.9 |
| verb | 54.5 | +24.2 / +31.7 / +18.7 | +6.1 / +6.2 / +18.1 | -0.1 / +2.0 / +11.9 |
| gender | 13.6 | +22.1 / +5.6 / +6.1 | +2.4 / +2.3 / +5.0 | +0.2 / +0.3 / +4.7 |
| temporal | 47.8 | -0.3 / -0.0 / -0.7 | -0.4 / -0.3 / -0.6 | -0.4 / +0.4 / +0.0 |
| mean | 40.2 | +11.49 / +10.76 / +8.26 | +2.25 / +6.07 / +5.64 | -0.04 / +1.02 / +4.14 |"""
PYTHIA = {  # means over tasks of full, lora, memit, oracle at 1e-3; 1e-4; 1e-5
    "70m": "-0.06 / -0.29 / +2.40 / +7.52 | -0.10 / -0.34 / – / +3.55 | +0.11 / +0.11 / – / –",
    "160m": "+0.05 / +0.04 / +0.92 / +3.75 | +0.12 / +0.13 / – / – | +0.05 / +0.24 / – / –",
    "410m": "-0.16 / +0.23 / +2.38 / +11.99 | +0.17 / +0.75 / +1.02 / +4.18 | -0.20 / -0.28 / – / –",
    "1b": "+12.20 / +4.30 / +3.76 / +19.53 | +1.80 / +4.30 / +0.88 / +10.18 | +0.62 / +1.70 / +0.30 / +5.77",
    "1.4b": "+8.71 / +12.55 / +1.89 / +21.02 | +1.68 / +7.29 / +1.43 / +10.24 | +0.65 / +5.92 / – / –",
    "2.8b": "+5.22 / +8.44 / +2.88 / +19.33 | +1.68 / +8.59 / +2.36 / – | +0.94 / +7.82 / – / –",
    "6.9b": "+5.15 / +9.65 / +2.22 / +20.06 | -0.08 / +7.50 / +1.87 / – | +0.03 / +4.87 / – / –",
}
ERRORS = {"70m": ".19", "160m": ".09", "410m": ".72", "1b": ".55", "1.4b": ".96", "2.8b": ".91", "6.9b": "1.59"}
# Table 2: MEMIT on pythia-6.9b at 1e-4, standard and oracle; for verb it prints 1.2 and -0.2, which no shipped file holds
TABLE_2 = {"country": "+2.7 +21.0", "company": "+1.7 +21.8", "stereoset": "-0.1 +0.8", "gender": "+7.3 +32.2", "temporal": "-0.1 –"}
BACKPACK = {  # before, as their report script has it; table 3 at 1e-5 for full, lora, senses, as printed
    "stereoset": (76.26, 0.0, 0.0, 1.9), "country": (9.95, 2.0, 1.7, 2.6), "company": (3.06, 0.2, -0.2, 1.6),
    "gender": (9.17, -0.5, -0.8, 12.0), "verb": (56.39, 0.0, 0.0, 10.6), "temporal": (23.05, 0.2, 0.1, 0.2),
}  # fmt: skip


def test_the_backpack_s_headline_follows_from_its_table() -> None:
    """No logs of these runs were shipped; what is printed must at least agree with itself."""
    means = [published.task_mean(column) for column in zip(*BACKPACK.values(), strict=True)]
    assert [round(m, 1) for m in means if m is not None] == [29.6, 0.3, 0.1, 4.8]


@pytest.mark.data
def test_table_4_comes_out_of_the_shipped_files_to_the_printed_digit() -> None:
    folder = real("published", "canonical", "workshop-gptj")
    cells = (*published.finetuned(folder), *published.ensemble(folder / "intervention.jsonl"))
    assert published.table(cells, "EleutherAI/gpt-j-6b", ("full", "lora", "ensemble")).split("\n", 2)[2] == GPTJ
    assert max(c.error for c in cells if c.error is not None) == pytest.approx(1.7, abs=0.05)
    hard = {m: published.pick(cells, "EleutherAI/gpt-j-6b", m, 1e-3) for m in ("full", "lora")}
    before = {t: round(sum(c.hard_before or 0 for c in (hard["full"][t], hard["lora"][t])) / 2, 1) for t in published.TASKS}
    assert before == {"country": 3.9, "company": 10.4, "stereoset": 40.1, "verb": 47.0, "gender": 1.6, "temporal": 4.2}
    assert [published.shown(hard[m]["company"].hard_change, 2) for m in ("lora", "full")] == ["-0.23", "-0.46"]


@pytest.mark.data
@pytest.mark.parametrize("size", PYTHIA)
def test_pythia_means_come_out_of_the_shipped_files(size: str) -> None:
    folder = real("published", "canonical", "workshop-pythia")
    cells = (*published.finetuned(folder), *published.memit(folder / "memit_results.test.final.float16.json"))
    lines = published.table(cells, f"EleutherAI/pythia-{size}", ("full", "lora", "memit", "oracle")).splitlines()
    assert lines[-1].split(" | ", 2)[2] == f"{PYTHIA[size]} |"
    errors = published.task_mean(c.error for c in published.pick(cells, f"EleutherAI/pythia-{size}", "lora", 1e-4).values())
    assert errors is not None and f"{errors:.2f}" == f"{float(ERRORS[size]):.2f}"
    if size == "6.9b":
        columns = [published.pick(cells, f"EleutherAI/pythia-{size}", m, 1e-4) for m in ("memit", "oracle")]
        assert {t: " ".join(published.shown(c[t].change) for c in columns) for t in TABLE_2} == TABLE_2
    if size == "1.4b":  # the ball does not bound damage nearby
        assert published.shown(published.pick(cells, "EleutherAI/pythia-1.4b", "lora", 1e-4)["stereoset"].hard_change, 2) == "+17.41"


@pytest.mark.data
def test_memit_on_the_backpack_does_next_to_nothing() -> None:
    cells = published.memit(real("published", "canonical", "workshop-pythia") / "memit_results.test.final.json")
    found = {
        m: {t: published.shown(c.change) for t, c in published.pick(cells, "backpack-gpt2", m, 1e-3).items()} for m in ("memit", "oracle")
    }
    assert found["memit"] == {
        "company": "+0.2",
        "country": "+0.0",
        "verb": "+0.0",
        "temporal": "+0.0",
        "stereoset": "+0.0",
        "gender": "+0.3",
    }
    assert found["oracle"]["country"] == "+1.1" and found["oracle"]["gender"] == "+0.4"
