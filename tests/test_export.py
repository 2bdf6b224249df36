"""Exports of hand-made patches, read back from the disk: orientation, ranks, dtypes; and that nothing is left of one that failed."""

import errno
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits, tiny_host, weights_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from errata import apply, artefact, export, hosts
from errata.hosts import Host
from errata.types import (
    Add,
    AddLowRank,
    Ensemble,
    Example,
    InvalidPatch,
    LedgerError,
    MissingExtra,
    Op,
    Patch,
    Senses,
    UnknownName,
    WrongBase,
)

EXAMPLE = Example(prompt="The capital of Mauritius is", target=" Port Louis")


def loaded(family: str, dtype: torch.dtype, folder: Path) -> Host:
    """A host as `load` makes it. (`model.to(bfloat16)` would round the rotary frequencies too, which no file holds.)"""
    host = tiny_host(family)
    host.model.save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)
    return hosts.load(str(folder), "cpu", dtype)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patch_of(host: Host, *ops: Op) -> Patch:
    return Patch(method="hand", config={}, parent=host.id, examples=(EXAMPLE,), ops=ops)


def dense(host: Host) -> Patch:
    weights = [f"{host.layout.blocks}.0.{host.layout.mlp_in[0]}.weight", f"{host.layout.norm}.weight", f"{host.layout.embedding}.weight"]
    return patch_of(host, *(Add(weight=w, delta=draw(*host.model.get_parameter(w).shape)) for w in weights))


def low_rank(host: Host, scales: tuple[float, ...] = (2.0,), ranks: tuple[int, ...] = (4,)) -> Patch:
    """One op on each MLP matrix; ranks and scales go round."""
    ops = []
    for i, name in enumerate(host.module_names((*host.layout.mlp_in, host.layout.mlp_out))):
        module = host.model.get_submodule(name)
        d_out, d_in = module.weight.T.shape if hosts.stored_transposed(module) else module.weight.shape
        r = ranks[i % len(ranks)]
        A, B = draw(r, d_in, seed=i), draw(d_out, r, seed=i + 50)
        ops.append(AddLowRank(weight=f"{name}.weight", A=A, B=B, scale=scales[i % len(scales)]))
    return patch_of(host, *ops)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "backpack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [dense, low_rank])
def test_a_model_is_read_back_bit_for_bit(family: str, dtype: torch.dtype, make: Callable[[Host], Patch], tmp_path: Path) -> None:
    host = loaded(family, dtype, tmp_path / "in")
    patch, before = make(host), weights_of(host)
    done = export.export(host, patch, tmp_path / "out")
    assert done.difference == 0 and done.patch == patch.id
    assert same_bits(host, before) and not host.worn
    fresh = hosts.load(str(tmp_path / "out"), "cpu", dtype)
    with apply.applied(host, patch):
        assert same_bits(host, weights_of(fresh))
        assert hosts.greedy(host, [EXAMPLE.prompt]) == hosts.greedy(fresh, [EXAMPLE.prompt])


def shifted(host: Host) -> Patch:
    """Senses of tokens that the example speaks of, and of one more."""
    ids = [*dict.fromkeys(hosts.tokens(host, EXAMPLE.prompt)), 399]
    rows = [torch.tensor(column) for column in zip(*sorted((i, k) for i in ids for k in (0, 2)), strict=True)]
    return patch_of(host, Senses(weight="backpack.overrides.senses", ids=rows[0], senses=rows[1], shift=draw(len(rows[0]), 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_shifted_senses_are_part_of_the_exported_checkpoint(dtype: torch.dtype, own: bool, tmp_path: Path) -> None:
    host = loaded("backpack", dtype, tmp_path / "in")
    if own:  # the checkpoint has a table itself
        host.model.override(torch.tensor([399, 5]), draw(8, 32).view(2, 4, 32))
        host = hosts.host_of(host.model, host.tokenizer)
    patch, before, config = shifted(host), weights_of(host), host.model.config.to_dict()
    said = hosts.greedy(host, [EXAMPLE.prompt])
    done = export.export(host, patch, tmp_path / "out")
    assert done.difference == 0 and same_bits(host, before) and host.model.config.to_dict() == config
    fresh = hosts.load(str(tmp_path / "out"), "cpu", dtype)
    with apply.applied(host, patch):
        assert same_bits(host, weights_of(fresh))
        assert hosts.greedy(host, [EXAMPLE.prompt]) == hosts.greedy(fresh, [EXAMPLE.prompt])
    assert hosts.greedy(host, [EXAMPLE.prompt]) == said != hosts.greedy(fresh, [EXAMPLE.prompt])
    host.model.save_pretrained(tmp_path / "again")
    assert ("backpack.overrides.ids" in load_file(tmp_path / "again" / "model.safetensors")) == own


@pytest.mark.parametrize("form", export.FORMS)
def test_two_models_are_no_export(form: str, tmp_path: Path) -> None:
    host, small = tiny_host("gpt2"), tiny_host("backpack", seed=7)
    host.beside["small"] = small
    shift = Senses(weight="backpack.overrides.senses", ids=torch.tensor([3]), senses=torch.tensor([1]), shift=draw(1, 32))
    patch = patch_of(host, Ensemble(weight="lm_head", small="small", parent=small.id, shift=shift))
    with pytest.raises(InvalidPatch, match="changes no weight of tiny-gpt2: small speaks beside it.*Keep the patch as a file"):
        export.export(host, patch, tmp_path / "out", form)
    assert not any(tmp_path.iterdir()) and not host.worn


def test_shifted_senses_are_no_adapter(tmp_path: Path) -> None:
    host = tiny_host("backpack")
    with pytest.raises(InvalidPatch, match="shifts sense vectors, and an adapter holds only .* part of its checkpoint"):
        export.export(host, shifted(host), tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "backpack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_the_base_answers_as_the_patched_host(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import peft

    host = loaded(family, dtype, tmp_path / "in")
    patch, before = low_rank(host), weights_of(host)
    batch = hosts.pad(host, [(host.tokenizer(EXAMPLE.prompt)["input_ids"], 1)])
    plain = hosts.logits(host, batch).float()
    done = export.export(host, patch, tmp_path / "out", "peft")
    assert same_bits(host, before) and not host.worn
    assert done.difference < export.TOLERANCE[dtype]
    with apply.applied(host, patch):
        wanted = hosts.logits(host, batch).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls deprecated properties
        model = peft.PeftModel.from_pretrained(hosts.load(str(tmp_path / "in"), "cpu", dtype).model, tmp_path / "out")
    got = model(input_ids=batch.ids_NT).logits.float()
    assert (got - wanted).abs().max() < 0.1 * (plain - wanted).abs().max()
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def config_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return read


def test_an_adapter_is_plain_lora_and_says_what_it_is_for(tiny_gpt2: Host, tmp_path: Path) -> None:
    patch = low_rank(tiny_gpt2)
    export.export(tiny_gpt2, patch, tmp_path / "out", "peft")
    config = config_of(tmp_path / "out")
    assert config["base_model_name_or_path"] == "tiny-gpt2"
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, True)
    assert isinstance(config["lora_alpha"], int)
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    assert config["rank_pattern"] == {} == config["alpha_pattern"]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as f:
        said = json.loads(f.metadata()["errata"])
    assert (said["base"], said["patch"]) == (tiny_gpt2.id, patch.id)


def test_ranks_and_scales_may_differ_within_a_patch(tiny_gpt2: Host, tmp_path: Path) -> None:
    patch = low_rank(tiny_gpt2, scales=(2.0, 0.3, 1.0), ranks=(4, 2, 4, 3))
    done = export.export(tiny_gpt2, patch, tmp_path / "out", "peft")
    config = config_of(tmp_path / "out")
    assert done.difference < 1e-4
    assert set(config["rank_pattern"].values()) == {2, 3}
    assert len(config["alpha_pattern"]) == 3


def test_linear_modules_beside_conv1d_ones(tmp_path: Path) -> None:
    host = tiny_host("gpt2")
    host.model.lm_head.weight = torch.nn.Parameter(host.model.lm_head.weight.detach().clone())  # untied
    host.model.config.tie_word_embeddings = False
    host = hosts.host_of(host.model, host.tokenizer, "untied")
    head = AddLowRank(weight="lm_head.weight", A=draw(2, 32), B=draw(400, 2, seed=1), scale=1.0)
    mlp = low_rank(host).ops[0]
    assert export.export(host, patch_of(host, mlp, head), tmp_path / "out", "peft").difference < 1e-4


def test_a_dense_patch_is_no_adapter(tiny_gpt2: Host, tmp_path: Path) -> None:
    with pytest.raises(InvalidPatch, match="only low-rank changes. Export it as a model, or build with --method lora"):
        export.export(tiny_gpt2, dense(tiny_gpt2), tmp_path / "out", "peft")
    table = AddLowRank(weight="transformer.wte.weight", A=draw(2, 32), B=draw(400, 2))
    with pytest.raises(InvalidPatch, match="belongs to no linear module"):
        export.export(tiny_gpt2, patch_of(tiny_gpt2, table), tmp_path / "out", "peft")
    with pytest.raises(InvalidPatch, match="changes nothing"):
        export.export(tiny_gpt2, patch_of(tiny_gpt2), tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_refused_because_the_adapter_would_answer_otherwise(tiny_gpt2: Host, tmp_path: Path) -> None:
    head = AddLowRank(weight="lm_head.weight", A=draw(2, 32), B=draw(400, 2, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LedgerError, match="does not answer as tiny-gpt2 under patch"):
            export.export(tiny_gpt2, patch_of(tiny_gpt2, head), tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


def test_without_peft_the_install_line_is_given(tiny_gpt2: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r'pip install "errata\[export\]"'):
        export.export(tiny_gpt2, low_rank(tiny_gpt2), tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


def spoil(path: Path, factor: float) -> None:
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    name = max(tensors, key=lambda n: tensors[n].ndim)
    save_file(tensors | {name: tensors[name] * factor}, path, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", export.FORMS)
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_what_comes_back_otherwise_than_it_went_is_removed(
    dtype: torch.dtype, form: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = loaded("llama", dtype, tmp_path / "in")
    before = weights_of(host)
    if form == "peft":
        write = artefact.write_whole

        def worse(path: Path, raw: bytes) -> None:
            write(path, raw)
            if path.suffix == ".safetensors":
                spoil(path, factor)

        monkeypatch.setattr(export, "write_whole", worse)
    else:
        load = hosts.load

        def load_worse(name: str, *args: Any) -> Host:
            spoil(Path(name) / "model.safetensors", factor)
            return load(name, *args)

        monkeypatch.setattr(hosts, "load", load_worse)
    with pytest.raises(LedgerError, match="The folder was removed"):
        export.export(host, low_rank(host), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    assert same_bits(host, before) and not host.worn


def test_logits_decide_also_where_the_weights_agree(tiny_gpt2: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = hosts.load

    def load_otherwise(name: str, *args: Any) -> Host:
        host = load(name, *args)
        host.model.transformer.ln_f.eps = 0.5  # no weight, and yet another model
        return host

    monkeypatch.setattr(hosts, "load", load_otherwise)
    with pytest.raises(LedgerError, match="does not answer as"):
        export.export(tiny_gpt2, low_rank(tiny_gpt2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tiny_gpt2: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiny_gpt2.model, "save_pretrained", full)
    with pytest.raises(LedgerError, match="Cannot write .*out: No space left on device"):
        export.export(tiny_gpt2, dense(tiny_gpt2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(tiny_gpt2: Host, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(LedgerError, match="is there already"):
            export.export(tiny_gpt2, dense(tiny_gpt2), taken)
    assert (tmp_path / "mine").read_text() == "x"
    (tmp_path / "empty").mkdir()
    export.export(tiny_gpt2, dense(tiny_gpt2), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_only_a_bare_host_and_its_own_patch(tiny_gpt2: Host, tmp_path: Path) -> None:
    patch = dense(tiny_gpt2)
    with pytest.raises(WrongBase):
        export.export(tiny_gpt2, replace(patch, parent="b2:" + "0" * 32), tmp_path / "out")
    with pytest.raises(UnknownName, match="Did you mean peft"):
        export.export(tiny_gpt2, patch, tmp_path / "out", "pefd")
    with apply.applied(tiny_gpt2, patch), pytest.raises(WrongBase, match="wears 1 patch"):
        export.export(tiny_gpt2, patch, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_says_what_it_is(tiny_llama: Host, tmp_path: Path) -> None:
    patch = dense(tiny_llama)
    done = export.export(tiny_llama, patch, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "errata.json").read_text())
    assert (said["patch"], said["base"], said["form"], said["dtype"]) == (patch.id, tiny_llama.id, "model", "float32")
    assert said["examples"] == [EXAMPLE.as_dict()]
    assert done.nbytes > patch.nbytes
