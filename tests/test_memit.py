"""memit and rome: the solve against a dense one, values against passes of the whole model, and what the two promise of hidden states."""

import dataclasses
import math

import pytest
import torch
from conftest import FAMILIES, TEXT, tiny_host
from torch import Tensor

from errata import apply, hooks, hosts
from errata.hosts import Host
from errata.ledger import Ledger
from errata.methods import _keys, _trace, _values
from errata.methods._normal import Plain, Prior, Whitened
from errata.methods.alphaedit import Alphaedit
from errata.methods.emmet import Emmet
from errata.methods.memit import Memit
from errata.methods.nse import Nse
from errata.methods.rome import Rome
from errata.methods.ultraedit import Ultraedit
from errata.types import Add, AddLowRank, Budget, Case, Example, InvalidExample, Patch, Run, State, UnknownName, WrongBase

MAURITIUS = Example(prompt="The capital of Mauritius is", target=" Port Louis")
EXAMPLES = (
    MAURITIUS,
    Example(prompt="The capital of France is", target=" Rome", subject="France"),
    Example(prompt="Lily loved to play outside in", target=" late"),
    Example(prompt="The nurse said that", target=" she", contrast=" he", goal="prefer", subject="nurse"),  # random hosts prefer " he"
    Example(prompt="The doctor said", target=" that he", contrast=" she", goal="balance"),
)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=0.5))
SETTINGS = _values.Settings(steps=8, lr=0.1, clamp=0.75, decay=0.05, kl=0.0625, stop=0.05, batch_size=256)
both_orientations = pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leads(host: Host, examples: tuple[Example, ...], run: Run, n: int) -> list[str]:
    return _values.prefixes(_values.quiet(host, examples, run, n), n)


def found_in(host: Host, examples: tuple[Example, ...] = EXAMPLES, contexts: int = 3) -> list[_values.Place]:
    return _values.places(host, examples, leads(host, examples, RUN, contexts))


def priors_of(host: Host, layers: list[int]) -> dict[int, tuple[Prior, float]]:
    modules = host.module_names((host.layout.mlp_out,), layers)
    C, _ = _keys.covariances(host, RUN.hold, modules, 4)
    return _keys.priors(host, State(method="memit", host=host.id, config={}, tensors=C), layers, "C", 1e-3)


# ------------------------------------------------------------------------------------------------------------------------- the solve


@pytest.mark.parametrize("facts", [1, 3, 20])
def test_gains_are_the_dense_solve(facts: int) -> None:
    root, K = randn(12, 30), randn(12, facts, seed=1)
    C = root @ root.T / 30
    dense = torch.linalg.inv(0.7 * C + K @ K.T) @ K
    torch.testing.assert_close(_keys.gains(Whitened(L_KK=torch.linalg.cholesky(C)), K, 0.7), dense.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("facts", [1, 3])
def test_without_a_prior_gains_are_the_equality_constraint(facts: int) -> None:
    root, K = randn(12, 30), randn(12, facts, seed=1)
    C = root @ root.T / 30
    dense = torch.linalg.inv(K.T @ torch.linalg.inv(C) @ K) @ K.T @ torch.linalg.inv(C)
    gains = _keys.gains(Whitened(L_KK=torch.linalg.cholesky(C)), K, 0.0)
    torch.testing.assert_close(gains, dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gains @ K, torch.eye(facts, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_keys_that_follow_from_one_another_are_refused_without_slack() -> None:
    K = randn(12, 1).repeat(1, 2)
    with pytest.raises(InvalidExample, match="slack"):
        _keys.gains(Plain(width=12), K, 0.0)
    shared = _keys.gains(Plain(width=12), K, 1e-3) @ K
    torch.testing.assert_close(shared, torch.full((2, 2), 0.5, dtype=torch.float64), rtol=1e-3, atol=0)


@both_orientations
def test_covariances_are_the_mean_over_tokens(host: Host) -> None:
    (module,) = host.module_names((host.layout.mlp_out,), [1])
    C, tokens = _keys.covariances(host, TEXT, [module], 1000)
    keys = []
    for text in TEXT:
        batch = hosts.pad(host, [(hosts.tokens(host, text), 1)])
        with torch.no_grad(), hooks.reading(host.model, [module], inputs=True) as seen:
            hosts.logits(host, batch)
        keys.append(seen[module][0])
    keys_NK = torch.cat(keys)
    assert tokens == len(keys_NK)
    torch.testing.assert_close(C[module], keys_NK.T @ keys_NK / tokens, rtol=1e-4, atol=1e-5)
    _, few = _keys.covariances(host, TEXT, [module], 1)
    assert len(C[module]) <= few < tokens


# --------------------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    ("prompt", "subject", "ends"),
    [
        ("The capital of Mauritius is", "Mauritius", "The capital of Mauritius"),
        ("Mauritius is an island; the capital of Mauritius is", "Mauritius", "Mauritius is an island; the capital of Mauritius"),
        ("The capital of Mauritius is", None, "The capital of Mauritius is"),
        ("Port Louis", "Port", "Port"),
    ],
)
def test_a_place_is_the_last_token_of_the_subject(pieces: bool, prompt: str, subject: str | None, ends: str) -> None:
    host = tiny_host("llama", pieces=pieces)
    e = Example(prompt=prompt, target=" Rome", subject=subject)
    for lead in ("", "Once upon a time. "):
        ids, given, at = _values.located(host, lead, e, e.target)
        assert host.tokenizer.decode(ids[: at + 1], skip_special_tokens=True).strip() == lead + ends and at < given


def test_a_subject_that_ends_inside_a_token_is_found(tiny_gpt2: Host) -> None:
    ids = hosts.tokens(tiny_gpt2, "The capital of France is")
    at = _values.last_token(tiny_gpt2, ids, "The capital of Fran")
    assert "Fran" in tiny_gpt2.tokenizer.decode(ids[: at + 1]) and "Fran" not in tiny_gpt2.tokenizer.decode(ids[:at])


def test_examples_that_read_the_same_up_to_their_place_share_it(tiny_gpt2: Host) -> None:
    money = Example(prompt="The capital of France lies", target=" on", subject="France")
    found = found_in(tiny_gpt2, (*EXAMPLES, money))
    assert sorted(len(place.examples) for place in found) == [1, 1, 1, 1, 2]
    assert all(math.isclose(sum(place.weights), 1) and place.weights[0] == 0.5 for place in found)


def test_a_prefix_that_does_not_fit_is_left_out(tiny_gpt2: Host) -> None:
    long = Example(prompt="Lily loved to play " * 9 + "outside", target=" late")
    (place,) = found_in(tiny_gpt2, (long,))
    assert len(place.keys) < 4 and max(len(a.ids) for a in place.asked) <= tiny_gpt2.context


def test_prefixes_state_no_edited_fact_and_follow_from_the_seed(tiny_gpt2: Host) -> None:
    told = leads(tiny_gpt2, EXAMPLES, RUN, 6)
    assert told and not any("Mauritius" in lead and "Port Louis" in lead for lead in told)
    assert told == leads(tiny_gpt2, EXAMPLES, RUN, 6)
    assert any(told != leads(tiny_gpt2, EXAMPLES, dataclasses.replace(RUN, seed=seed), 6) for seed in range(1, 6))


# --------------------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_part_above_a_block_is_the_whole_model(family: str) -> None:
    """With the block's output shifted at one token of each row, for all rows and for some."""
    host = tiny_host(family)
    asked = [a for place in found_in(host) for a in place.asked]
    above, every = _values._Above(host, 0, asked), list(range(len(asked)))
    shift_ND = 0.3 * randn(len(asked), 32).float()

    def shift(x: Tensor) -> Tensor:
        x = x.clone()
        x[torch.arange(len(asked)), above.at_N] += shift_ND
        return x

    with torch.no_grad(), hooks.shifting(host.model, {f"{host.layout.blocks}.0": shift}):
        whole_QV = hosts.predictions(host, above.batch)
    with torch.no_grad():
        torch.testing.assert_close(above.predictions(every, shift_ND), whole_QV, rtol=1e-4, atol=1e-4)
        row_Q, _ = above.scored(every)
        live = sorted(sorted(every, key=lambda i: len(asked[i].ids))[:4])  # short ones: fewer columns are enough
        some = above.predictions(live, shift_ND[live])
    torch.testing.assert_close(some, whole_QV[torch.isin(row_Q, torch.tensor(live))], rtol=1e-4, atol=1e-4)
    assert not any("forward" in m.__dict__ for m in host.model.modules())


@both_orientations
def test_values_of_a_batch_are_those_of_its_facts_alone(host: Host) -> None:
    found = found_in(host)
    together = _values.values(host, found, 0, SETTINGS, RUN.progress)
    alone = torch.cat([_values.values(host, [place], 0, SETTINGS, RUN.progress) for place in found])
    assert float(together.norm(dim=1).min()) > 0.1
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def loss_of(host: Host, place: _values.Place, delta_D: Tensor) -> float:
    """The first example's loss on its plain prompt, the block's output shifted: the formulas anew, with a pass of the whole model."""
    (e,) = place.examples

    def logp(answer: str) -> float:
        ids, given, at = _values.located(host, "", e, answer)

        def shift(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, at] += delta_D
            return x

        with torch.no_grad(), hooks.shifting(host.model, {f"{host.layout.blocks}.0": shift}):
            return float(hosts.scored_logprobs(host, hosts.pad(host, [(ids, given)])).sum())

    p = logp(e.target)
    ahead = p - logp(e.contrast) if e.contrast else 0.0
    return {"raise": -p, "lower": -math.log1p(-math.exp(p)), "prefer": -ahead, "balance": abs(ahead)}[e.goal]


@both_orientations
def test_values_reduce_the_loss_of_every_goal(host: Host) -> None:
    lower = Example(prompt="Paris lies on the", target=host.tokenizer.decode(_greedy(host, "Paris lies on the")), goal="lower")
    found = found_in(host, (*EXAMPLES, lower))
    settings = dataclasses.replace(SETTINGS, stop=0.0)
    delta_PD = _values.values(host, found, 0, settings, RUN.progress)
    for place, delta_D in zip(found, delta_PD, strict=True):
        assert loss_of(host, place, delta_D) < loss_of(host, place, 0 * delta_D), place.examples


def _greedy(host: Host, prompt: str) -> list[int]:
    with torch.no_grad():
        return [int(hosts.logits(host, hosts.pad(host, [(hosts.tokens(host, prompt), 1)]))[0, -1].argmax())]


def test_a_fact_that_is_done_stays_where_it_is_and_the_others_go_on(tiny_llama: Host) -> None:
    rare = Example(prompt="Paris lies on the", target=" Port Louis", goal="lower")  # it says that hardly ever as it is
    found = found_in(tiny_llama, (MAURITIUS, rare))
    delta_PD = _values.values(tiny_llama, found, 0, SETTINGS, RUN.progress)
    moved = {place.examples[0].goal: float(d.norm()) for place, d in zip(found, delta_PD, strict=True)}
    assert moved["lower"] == 0.0 and moved["raise"] > 0.1
    long = dataclasses.replace(SETTINGS, steps=60, decay=0.0, stop=1.0, clamp=3.0)
    # one token: the next ones of a random model hardly depend on a hidden state before them
    (place,) = found_in(tiny_llama, (Example(prompt="The capital of Mauritius is", target=" on"),), contexts=0)
    (delta_D,) = _values.values(tiny_llama, [place], 0, long, RUN.progress)
    assert 0.1 < loss_of(tiny_llama, place, delta_D) < 1.0, "it went on until the loss was below `stop`"
    further = _values.values(tiny_llama, [place], 0, dataclasses.replace(long, steps=90), RUN.progress)[0]
    assert torch.equal(further, delta_D), "and no further"


def test_delta_is_no_longer_than_the_clamp(tiny_gpt2: Host) -> None:
    found = found_in(tiny_gpt2)
    delta_PD = _values.values(tiny_gpt2, found, 0, dataclasses.replace(SETTINGS, clamp=0.2), RUN.progress)
    (module,) = tiny_gpt2.module_names((tiny_gpt2.layout.mlp_out,), [0])
    plain = [dataclasses.replace(place, keys=place.keys[:1], weights=(1.0,)) for place in found]
    _, h_PD = _keys.averaged(tiny_gpt2, plain, module, "transformer.h.0", {})
    share_P = delta_PD.norm(dim=1) / h_PD.norm(dim=1)
    assert 0.19 < float(share_P.max()) <= 0.2 + 1e-5


# ------------------------------------------------------------------------------------------------------------------- what is promised


@both_orientations
def test_memit_brings_the_last_layer_to_its_values(host: Host) -> None:
    """With C weighing next to nothing; plain prompts, and the hidden states read from passes of the whole model."""
    found = found_in(host, contexts=0)
    delta_PD = 0.5 * randn(len(found), 32).float()
    ops, weights = _keys.spread(host, found, delta_PD, priors_of(host, [0, 1]), lambda own, K: _keys.gains(own[0], K, 1e-9))

    def hidden() -> Tensor:
        out = []
        for place in found:
            with torch.no_grad(), hooks.reading(host.model, [f"{host.layout.blocks}.1"]) as seen:
                hosts.logits(host, hosts.pad(host, [(place.keys[0], 1)]))
            (h_TD,) = seen.values()
            out.append(h_TD[0, -1])
        return torch.stack(out)

    patch = dataclasses.replace(Memit(layers="0-1").edit(host, EXAMPLES, RUN), ops=ops)
    before = hidden()
    with apply.applied(host, patch):
        torch.testing.assert_close(hidden() - before, delta_PD, rtol=0, atol=1e-3)
        for name, w in weights.items():
            torch.testing.assert_close(host.model.get_parameter(name).detach(), w, rtol=1e-5, atol=1e-5)
    assert len(ops) == 2 and all(float(apply.change(host, op).norm()) > 0.01 for op in ops), "both layers take their share"


@both_orientations
def test_the_first_layer_takes_its_share_and_lam_holds_back(host: Host) -> None:
    """Of two layers, the first writes half of what is missing; with lam, lam / (lam + k^T C^-1 k) of it is left out."""
    found = found_in(host, (MAURITIUS,), contexts=3)
    delta_PD, known = 0.5 * randn(1, 32).float(), priors_of(host, [0, 1])
    (module,) = host.module_names((host.layout.mlp_out,), [0])
    key_PK, _ = _keys.averaged(host, found, module, f"{host.layout.blocks}.1", {})
    energy = _keys.mean_energy(known[0][0], key_PK.T)
    for lam in (1e-9, energy):
        (op, _), _ = _keys.spread(host, found, delta_PD, known, lambda own, K, lam=lam: _keys.gains(own[0], K, lam))
        assert isinstance(op, AddLowRank) and op.A.shape[0] == 1
        torch.testing.assert_close((op.B @ op.A).double() @ key_PK[0], delta_PD[0].double() / (2 if lam < 1 else 4), rtol=1e-4, atol=1e-6)


@both_orientations
def test_lam_is_raised_until_the_budget_is_kept(host: Host) -> None:
    """On the documents that state no edited fact; and no further than that, and not where it is kept anyway."""
    method = Memit(layers="0", contexts=0, steps=8, lr=0.5, clamp=4.0, stop=0.0, decay=0.0, lam=1e-3)  # far, so that it costs something
    still = hosts.chunks(host, _values.quiet(host, EXAMPLES, RUN, method.held))
    before_N2 = hosts.score(host, still)

    def cost(patch: Patch) -> float:
        with apply.applied(host, patch):
            return hosts.increase(before_N2, hosts.score(host, still))[0]

    free = dataclasses.replace(method, held=0).edit(host, EXAMPLES, RUN)
    least = cost(free)
    assert least > 1e-3, "or there would be nothing to keep"
    wide, narrow = (method.edit(host, EXAMPLES, dataclasses.replace(RUN, budget=Budget(epsilon=e))) for e in (2 * least, least / 4))
    assert torch.equal(apply.change(host, wide.ops[0]), apply.change(host, free.ops[0]))
    assert 0.5 * least / 4 < cost(narrow) <= least / 4


@both_orientations
def test_rome_keeps_its_constraint_and_changes_text_least(host: Host) -> None:
    """W' k* = v* for one fact; and E|W' k - W k|^2 over the text is no greater than that of other changes that keep it."""
    found = found_in(host, (MAURITIUS,))
    method = Rome(layers="0", contexts=3)
    patch = method.edit(host, (MAURITIUS,), RUN)
    delta_D = _values.values(host, found, 0, dataclasses.replace(SETTINGS, steps=method.steps), RUN.progress)[0]
    (module,), (op,) = host.module_names((host.layout.mlp_out,), [0]), patch.ops
    key_K = _keys.averaged(host, found, module, f"{host.layout.blocks}.0", {})[0][0]
    change = (op.B @ op.A).double()
    torch.testing.assert_close(change @ key_K, delta_D.double(), rtol=1e-4, atol=1e-4)
    own, _ = _keys.priors(host, method.prepare(host, (), RUN), [0], "C", method.ridge)[0]
    assert isinstance(own, Whitened)
    L = own.L_KK.tril()
    least = (change @ L).square().sum()
    for seed in range(3):
        other = change + 0.1 * (sideways := randn(*change.shape, seed=seed)) - 0.1 * torch.outer(sideways @ key_K, key_K) / (key_K @ key_K)
        torch.testing.assert_close(other @ key_K, change @ key_K)
        assert (other @ L).square().sum() > least


@both_orientations
@pytest.mark.parametrize("prior", ["C", "I", "U"])
@pytest.mark.parametrize("method", [Memit, Nse, Emmet])
def test_every_prior_is_its_dense_solve(host: Host, method: type[Memit | Nse | Emmet], prior: str) -> None:
    """(K K^T + lam P)^-1 K, with lam in the units of the prior; for "U" inside its basis."""
    weighs = {"slack": 0.7} if method is Emmet else {"lam": 0.7}
    made = method(
        layers="0", prior=prior, contexts=0, steps=2, stop=0.0, held=0, **weighs, **({"p": 1.0, "rounds": 1} if method is Nse else {})
    )
    (op,), state = made.edit(host, EXAMPLES, RUN).ops, made.prepare(host, (), RUN)
    (module,) = host.module_names((host.layout.mlp_out,), [0])
    C, K = state.tensors[module].double(), _keys.averaged(host, found_in(host, contexts=0), module, f"{host.layout.blocks}.0", {})[0].T
    s, U = torch.linalg.eigh(C)
    hardly = int((s.clamp(min=0).cumsum(0) <= 0.02 * s.sum()).sum()) if prior == "U" else len(C)
    U, s = U[:, :hardly], s[:hardly]
    stiff = U.T @ (C + 1e-3 * C.diagonal().mean() * torch.eye(len(C))) @ U if prior == "C" else torch.eye(hardly).double()
    inside = U.T @ K
    unit = {"C": float(len(C)), "I": float(C.trace()), "U": float(s.sum())}[prior]
    unit = float((inside * torch.linalg.solve(stiff, inside)).sum(0).mean()) if method is Emmet else unit
    wanted = U @ torch.linalg.solve(inside @ inside.T + 0.7 * unit * stiff, inside)
    assert isinstance(op, AddLowRank)
    torch.testing.assert_close(op.A.double(), wanted.T, rtol=1e-4, atol=1e-6)


def test_the_null_space_makes_alphaedit_of_memit_and_other_priors_are_refused(tiny_gpt2: Host) -> None:
    how = {"layers": "0-1", "contexts": 0, "steps": 2}
    for a, b in zip(*(made.edit(tiny_gpt2, EXAMPLES, RUN).ops for made in (Memit(prior="U", **how), Alphaedit(**how))), strict=True):
        assert torch.equal(apply.change(tiny_gpt2, a), apply.change(tiny_gpt2, b))
    for method, name in ((Memit, "memit"), (Nse, "nse"), (Emmet, "emmet"), (Ultraedit, "ultraedit")):
        with pytest.raises(InvalidExample, match=f'{name} has the priors "C", "I" and "U"'):
            method(prior="c")


def test_several_facts_keep_their_constraints_nearly(tiny_llama: Host) -> None:
    found = found_in(tiny_llama)
    delta_PD = 0.5 * randn(len(found), 32).float()
    (module,) = tiny_llama.module_names((tiny_llama.layout.mlp_out,), [0])
    key_PK = _keys.averaged(tiny_llama, found, module, "model.layers.0", {})[0]
    (op,), _ = _keys.spread(tiny_llama, found, delta_PD, priors_of(tiny_llama, [0]), Rome()._solve)
    change = apply.change(tiny_llama, op).double()
    torch.testing.assert_close(key_PK @ change.T, delta_PD.double(), rtol=0, atol=0.02)


def test_few_facts_are_kept_as_factors_and_many_as_their_product(tiny_gpt2: Host) -> None:
    many = tuple(Example(prompt=f"{a} of {b} is", target=" Rome") for a in ("The capital", "One half", "The rest") for b in "abcdefghij")
    settings = {"layers": "0", "steps": 1, "contexts": 0, "lam": 0.1}
    (few,), (all_,) = (Memit(**settings).edit(tiny_gpt2, examples, RUN).ops for examples in (EXAMPLES, many))
    assert isinstance(few, AddLowRank) and few.A.shape == (5, 128) and isinstance(all_, Add)


# ------------------------------------------------------------------------------------------------------------- states, layers, tracing


@pytest.mark.parametrize("method", [Memit(steps=2, width=1), Rome(steps=2)], ids=["memit", "rome"])
def test_a_prepared_state_is_kept_and_gives_the_same_patch(method: Memit | Rome, tiny_gpt2: Host, tmp_path) -> None:
    case = Case(example=MAURITIUS)
    state = method.prepare(tiny_gpt2, [case], RUN)
    assert state.trained_on == {case.id} and state.id == method.prepare(tiny_gpt2, [case], RUN).id
    with Ledger.create(tmp_path / "ledger", host=tiny_gpt2.id, model="tiny", budget=RUN.budget) as ledger:
        kept = ledger.state(ledger.put_state(state))
    with_state = method.edit(tiny_gpt2, (MAURITIUS,), dataclasses.replace(RUN, state=kept))
    assert with_state.id == method.edit(tiny_gpt2, (MAURITIUS,), RUN).id
    with pytest.raises(WrongBase, match="was prepared on"):
        method.edit(tiny_host("gpt2", seed=1), (MAURITIUS,), dataclasses.replace(RUN, state=kept))
    other = "1" if state.config["layers"] == [0] else "0"
    with pytest.raises(UnknownName, match="covariance"):
        dataclasses.replace(method, layers=other).edit(tiny_gpt2, (MAURITIUS,), dataclasses.replace(RUN, state=kept))


def test_without_cases_the_layers_are_traced_on_text(tiny_llama: Host) -> None:
    state = Memit().prepare(tiny_llama, (), RUN)
    assert state.config["layers"] == [0] and not state.trained_on and len(state.tensors) == 1


def test_layers_are_read_as_ranges_and_lists(tiny_gpt2: Host) -> None:
    assert _keys.layers_of(tiny_gpt2, "0-1") == [0, 1] == _keys.layers_of(tiny_gpt2, "1, 0")
    for wrong in ("2", "1-0", "x", "0-5"):
        with pytest.raises(UnknownName, match="Unknown layer"):
            _keys.layers_of(tiny_gpt2, wrong)
    with pytest.raises(InvalidExample, match="rome rewrites one layer"):
        Rome(layers="0-1").edit(tiny_gpt2, (MAURITIUS,), RUN)


PROMPT = (MAURITIUS.prompt, None)


def test_tracing_sees_which_mlp_speaks(tiny_gpt2: Host) -> None:
    """One that is switched off has no effect, nor has the last one before the last token; restoring what is clean has all of it."""
    assert _trace.trace(tiny_gpt2, [PROMPT], 1).effects_EW.shape == (1, 2)
    assert _trace.trace(tiny_gpt2, [PROMPT], 2).effects_EW.shape == (1, 1)
    first, last = _trace.trace(tiny_gpt2, [(MAURITIUS.prompt, "Mauritius")], 1).effects_EW[0].tolist()
    assert first != 0.0 and last == 0.0
    with torch.no_grad():
        for name in ("weight", "bias"):
            tiny_gpt2.model.get_parameter(f"transformer.h.0.mlp.c_proj.{name}").zero_()
    first, last = _trace.trace(tiny_gpt2, [PROMPT], 1).effects_EW[0].tolist()
    assert first == 0.0 and last != 0.0


def test_what_is_corrupted_and_what_is_clean(tiny_llama: Host) -> None:
    """p of the model's own answer; and noise on a subject leaves what comes before it alone."""
    told = _trace.trace(tiny_llama, [PROMPT, ("Mauritius lies in the", "Mauritius")], 1, samples=3)
    with torch.no_grad():
        batch = hosts.pad(tiny_llama, [(hosts.tokens(tiny_llama, MAURITIUS.prompt), 1)])
        best = hosts.logits(tiny_llama, batch)[0, -1].softmax(-1).max()
    assert float(told.clean_E[0]) == pytest.approx(float(best), rel=1e-4)
    assert bool((told.corrupted_E != told.clean_E).all())
    again = _trace.trace(tiny_llama, [PROMPT], 1, samples=3, seed=1)
    assert float(again.clean_E[0]) == pytest.approx(float(best), rel=1e-4) and float(again.corrupted_E[0]) != float(told.corrupted_E[0])


def test_the_window_with_the_greatest_mean_effect_is_chosen_but_not_the_last() -> None:
    def chosen(*effects: list[float], width: int = 2) -> list[int]:
        p_E = torch.zeros(len(effects))
        return _trace.Trace(width=width, clean_E=p_E, corrupted_E=p_E, effects_EW=torch.tensor(effects)).chosen

    assert chosen([0.1, 0.3, 0.2]) == [1, 2] and chosen([0.1, 0.0, 0.9]) == [0, 1] and chosen([0.5]) == [0, 1]
    assert chosen([0.4, 0.3, 0.0], [0.0, 0.3, 0.0], width=1) == [1], "their mean counts"


def test_what_cannot_be_traced_is_refused(tiny_gpt2: Host) -> None:
    for prompt in ("", "The capital of Mauritius " * 40):
        with pytest.raises(InvalidExample, match="can be traced on 1 to 127"):
            _trace.trace(tiny_gpt2, [(prompt, None)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_can_be_traced(family: str) -> None:
    host = tiny_host(family)
    told = _trace.trace(host, [(e.prompt, e.subject) for e in EXAMPLES[:2]], samples=3)
    assert told.effects_EW.shape == (2, 2) and bool(told.effects_EW.isfinite().all()) and bool(told.effects_EW.any())
    assert told.width == 1 and told.chosen == [0]
