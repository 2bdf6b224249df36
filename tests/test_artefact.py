"""One file in, the same patch out; anything else is refused with a sentence, and never with another exception."""

import errno
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_host
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from errata import artefact
from errata.apply import applied
from errata.artefact import from_bytes, load_patch, save, to_bytes
from errata.types import Add, AddLowRank, Ensemble, Example, InvalidPatch, LedgerError, Patch, Senses, canonical_json, digest, tensor_bytes

PARENT = "b2:" + "0" * 32


def patch_of(**change: Any) -> Patch:
    draw = torch.Generator().manual_seed(0)
    ops = (
        Add(weight="model.layers.1.mlp.down_proj.weight", delta=torch.randn(4, 6, generator=draw)),
        AddLowRank(
            weight="model.layers.0.mlp.down_proj.weight",
            A=torch.randn(2, 6, generator=draw),
            B=torch.randn(4, 2, generator=draw),
            scale=0.3,
        ),
    )
    examples = (
        Example(prompt="The capital of Mauritius is", target=" Port Louis", subject="Mauritius"),
        Example(prompt='Zürich "is" \\ \n\x1f', target=" 東京🙂", contrast=" x", goal="prefer"),
    )
    fields = {"method": "finetune", "config": {"lr": 1e-05, "layers": [1, 2]}, "parent": PARENT, "examples": examples, "ops": ops}
    return Patch(**fields | change)


SHIFTS = Senses(
    weight="backpack.overrides.senses",
    ids=torch.tensor([3, 3, 50_000]),
    senses=torch.tensor([0, 15, 2]),
    shift=torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
)
BESIDE = Ensemble(weight="embed_out", small="lab/backpack", parent="b2:" + "7" * 32, shift=SHIFTS, scale=0.7)
PATCH = patch_of()
RAW = to_bytes(PATCH)
HEADER = 8 + struct.unpack("<Q", RAW[:8])[0]


def refused(raw: bytes, *told: str) -> None:
    with pytest.raises(InvalidPatch) as caught:
        from_bytes(raw, "this.patch")
    sentence = str(caught.value)
    assert "this.patch" in sentence and sentence.endswith(".") and all(part in sentence for part in told), sentence


# ----------------------------------------------------------------------------------------------------------------- the round trip


def same(a: Patch, b: Patch) -> bool:
    def tensors(p: Patch) -> dict[tuple[str, str], tuple[Any, bytes]]:
        return {(op.weight, n): (t.shape, tensor_bytes(t)) for op in p.ops for n, t in op.tensors.items()}

    return (
        a.id == b.id
        and tensors(a) == tensors(b)
        and (a.method, a.config, a.parent, a.examples) == (b.method, b.config, b.parent, b.examples)
    )


@pytest.mark.parametrize("patch", [
    PATCH,
    patch_of(ops=()),
    patch_of(examples=(), config={}),
    patch_of(ops=(SHIFTS,)),
    patch_of(ops=(Add(weight="z", delta=torch.ones(1)), SHIFTS, Add(weight="a", delta=torch.ones(1)))),
    patch_of(ops=(BESIDE,)),
    patch_of(ops=(BESIDE, SHIFTS, Add(weight="a", delta=torch.ones(1)))),
    patch_of(ops=(Senses(weight="s", ids=torch.zeros(0).long(), senses=torch.zeros(0).long(), shift=torch.zeros(0, 5)),)),
    patch_of(ops=(Add(weight="a", delta=torch.tensor(1.5)), Add(weight="b", delta=torch.zeros(0)), Add(weight="c", delta=-torch.zeros(3)))),
    patch_of(ops=(AddLowRank(weight="a", A=torch.zeros(0, 3), B=torch.zeros(2, 0), scale=2.0),)),
    patch_of(ops=(Add(weight="a", delta=torch.tensor([1e-45, 3.4e38, -0.0])),)),
], ids=[
    *("whole", "no ops", "no examples", "senses", "senses beside", "ensemble", "ensemble beside", "no senses"),
    *("odd shapes", "rank 0", "extreme numbers"),
])  # fmt: skip
def test_what_was_saved_is_what_is_loaded(patch: Patch, tmp_path: Path) -> None:
    path = save(patch, tmp_path / "deep" / "er" / "x.safetensors")
    assert same(load_patch(path), patch) and same(load_patch(str(path)), patch)
    assert path.read_bytes() == to_bytes(patch) == to_bytes(load_patch(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


TEXT = st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
JSON = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.lists(st.integers(), max_size=3)
)


NAME = st.text(alphabet=st.characters(codec="utf-8"), min_size=1)
NUMBERS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5)


@given(NAME, st.dictionaries(TEXT, JSON, max_size=4), TEXT, NUMBERS, st.integers(0, 200))
def test_any_patch_survives_the_round_trip(method: str, config: dict[str, Any], text: str, numbers: list[float], pad: int) -> None:
    op = Add(weight=text, delta=torch.tensor(numbers, dtype=torch.float32))
    patch = patch_of(method=method, config=config | {"pad": "x" * pad}, ops=(op,), examples=(Example(prompt=text, target=text),))
    assert same(from_bytes(to_bytes(patch)), patch)


def test_every_length_of_header_is_read() -> None:
    """The header's length stands in the first bytes, and for some lengths they look like those of a pickle."""
    seen = set()
    for pad in range(0, 264, 8):
        patch = patch_of(config={"pad": "x" * pad})
        raw = to_bytes(patch)
        seen.add(raw[:1])
        assert same(from_bytes(raw), patch)
    assert b"\x80" in seen


def test_a_header_that_begins_as_a_zip_does_is_read() -> None:
    raw = to_bytes(patch_of(config={"pad": ""}))
    missing = 0x4B50 - struct.unpack("<Q", raw[:8])[0]
    patch = patch_of(config={"pad": "x" * missing})
    raw = to_bytes(patch)
    assert raw[:2] == b"PK" and same(from_bytes(raw), patch)


def test_the_bytes_are_a_function_of_the_patch() -> None:
    a, b = PATCH.ops
    assert (
        to_bytes(PATCH)
        == to_bytes(patch_of())
        == to_bytes(patch_of(ops=(b, a)))
        == to_bytes(patch_of(config={"layers": (1, 2), "lr": 1e-5}))
    )
    assert digest(RAW) == digest(to_bytes(from_bytes(RAW)))


def test_tensors_may_be_views_share_storage_and_need_gradients() -> None:
    big = torch.arange(24.0).reshape(4, 6)
    shared = AddLowRank(weight="a", A=big[:2], B=big.T[:, :2])
    ops = (
        shared,
        AddLowRank(weight="b", A=big[:2], B=big.T[:, :2]),
        Add(weight="c", delta=big.T),
        Add(weight="d", delta=big.clone().requires_grad_()),
    )
    ops = (*ops, Add(weight="e", delta=torch.ones(2).expand(3, 2)))
    assert same(from_bytes(to_bytes(patch_of(ops=ops))), patch_of(ops=ops))


def test_what_is_loaded_computes_what_was_saved(tmp_path: Path) -> None:
    host = tiny_host("gpt2")
    op = AddLowRank(weight="transformer.h.0.mlp.c_proj.weight", A=torch.ones(1, 128), B=torch.linspace(0, 1, 32)[:, None])
    patch = patch_of(parent=host.id, ops=(op,))
    path, ids = save(patch, tmp_path / "x"), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        with applied(host, patch):
            said = host.model(ids).logits
        with applied(host, load_patch(path)):
            assert torch.equal(host.model(ids).logits, said)


# ----------------------------------------------------------------------------------------------------------------- damaged or altered


@given(st.integers(0, len(RAW) - 1))
@example(0)
@example(7)
@example(8)
@example(HEADER)
@example(len(RAW) - 1)
def test_a_file_cut_anywhere_is_refused(length: int) -> None:
    refused(RAW[:length])


@given(st.integers(0, 8 * len(RAW) - 1))
@settings(max_examples=150)
def test_a_flip_of_any_bit_is_refused(bit: int) -> None:
    raw = bytearray(RAW)
    raw[bit // 8] ^= 1 << bit % 8
    refused(bytes(raw))


@given(st.integers(0, 8 * HEADER - 1))
@settings(max_examples=150)
def test_a_flip_of_any_bit_of_the_header_is_refused(bit: int) -> None:
    test_a_flip_of_any_bit_is_refused.hypothesis.inner_test(bit)


def test_spelling_the_same_value_otherwise_is_refused() -> None:
    assert b"1e-05" in RAW and b"001f" in RAW
    refused(RAW.replace(b"1e-05", b"1E-05"), "says it otherwise")
    refused(RAW.replace(b"001f", b"001F"), "says it otherwise")


@given(st.integers(0, len(RAW)), st.binary(min_size=1, max_size=9))
def test_bytes_put_in_anywhere_are_refused(at: int, more: bytes) -> None:
    refused(RAW[:at] + more + RAW[at:])


@given(st.integers(0, len(RAW) - 1), st.binary(min_size=1, max_size=40))
def test_bytes_overwritten_anywhere_are_refused(at: int, other: bytes) -> None:
    raw = RAW[:at] + other + RAW[at + len(other) :]
    assume(raw != RAW)
    refused(raw)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(raw: bytes) -> None:
    refused(raw)
    refused(struct.pack("<Q", len(raw)) + raw)


@pytest.mark.parametrize(
    "length, told", [(2**64 - 1, "a header of"), (artefact.MAX_HEADER + 1, "a header of"), (len(RAW), "cut short"), (0, "not JSON")]
)
def test_a_header_s_length_is_not_believed(length: int, told: str) -> None:
    refused(struct.pack("<Q", length) + RAW[8:], told)


def test_a_header_of_brackets_is_refused() -> None:
    for header in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"9" * 100_000,
        b"[]",
        b"1",
        b'"a"',
        b"{}",
        b"null",
    ):
        refused(struct.pack("<Q", len(header)) + header)
    deep = "[" * 100_000 + "]" * 100_000
    refused(write_tensors({}, metadata={"errata": deep}))
    manifest = canonical_json(manifest_of(RAW))
    refused(write_tensors({}, metadata={"errata": manifest.replace('"config":{', '"config":{"deep":' + deep + ",")}))


def test_pickles_are_named_as_such(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"patch": torch.zeros(3), "trap": Trap()}, tmp_path / "zip.pt")
    torch.save({"patch": torch.zeros(3), "trap": Trap()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps([Trap(), "x" * 100], protocol))
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 6
    for path in files:
        with pytest.raises(InvalidPatch, match="is a pickle. Errata reads only safetensors files, which cannot run code"):
            load_patch(path)
    for protocol in (0, 1):
        refused(pickle.dumps([Trap(), "x" * 100], protocol))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("metadata, told", [
    (None, "not a patch of errata"),
    ({"format": "pt"}, "not a patch of errata"),
    ({"errata": "no json"}, "not a patch of errata"),
    ({"errata": "[]"}, "not a patch of errata"),
    ({"errata": "5"}, "not a patch of errata"),
    ({"errata": "{}"}, "not a patch of errata"),
    ({"errata": '{"format":"errata-patch-9"}'}, "has format 'errata-patch-9', this version reads 'errata-patch-1'"),
    ({"errata": '{"format":null}'}, "has format 'None'"),
    ({"errata": '{"format":"errata-patch-1"}'}, "is damaged"),
])  # fmt: skip
def test_other_safetensors_files_are_refused(metadata: dict[str, str] | None, told: str) -> None:
    refused(write_tensors({"weight": torch.zeros(2)}, metadata=metadata), told)


# ------------------------------------------------------------------------------------------- rewritten by someone who knows the format


def manifest_of(raw: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", raw[:8])
    manifest: dict[str, Any] = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["errata"])
    return manifest


def rewritten(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], raw: bytes = RAW, **metadata: str) -> bytes:
    manifest, tensors = manifest_of(raw), read_tensors(raw)
    change(manifest, tensors)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return write_tensors(tensors, metadata={"errata": text} | metadata)


def test_rewriting_alone_changes_nothing() -> None:
    assert rewritten(lambda m, t: None) == RAW


@pytest.mark.parametrize("change, told", [
    (lambda m, t: m["examples"][0].update(target=" Curepipe"), "was altered"),
    (lambda m, t: m["examples"].reverse(), "was altered"),
    (lambda m, t: m["examples"].pop(), "was altered"),
    (lambda m, t: m["config"].update(lr=1), "was altered"),
    (lambda m, t: m.update(method="memit"), "was altered"),
    (lambda m, t: m.update(parent="b2:" + "1" * 32), "was altered"),
    (lambda m, t: m.update(id="b2:" + "1" * 32), f"states the id b2:{'1' * 32}, its content has {PATCH.id}"),
    (lambda m, t: m.update(note="free of charge"), "says more than errata wrote"),
    (lambda m, t: m["ops"][0].update(scale=0.6), "was altered"),
    (lambda m, t: m["ops"][0].update(scale="0.3"), ""),
    (lambda m, t: m["ops"][0].update(kind="Memory"), "is damaged"),
    (lambda m, t: m["ops"][0].update(kind="Add"), "is damaged"),
    (lambda m, t: m["ops"][1].update(kind="AddLowRank"), "is damaged"),
    (lambda m, t: m["ops"].reverse(), "is damaged"),
    (lambda m, t: m["ops"].pop(), "tensors that no op names: 1.delta"),
    (lambda m, t: m["ops"].append(m["ops"][0]), "is damaged"),
    (lambda m, t: m["ops"][0].update(weight=m["ops"][1]["weight"]), "one op for each weight"),
    (lambda m, t: m["ops"][1].update(weight="model.layers.2.mlp.down_proj.weight"), "was altered"),
    (lambda m, t: t["1.delta"].neg_(), "was altered"),
    (lambda m, t: t["1.delta"][0].fill_(float("nan")), "holds NaN or infinity"),
    (lambda m, t: t["0.A"][0].fill_(float("inf")), "holds NaN or infinity"),
    (lambda m, t: t.update({"1.delta": t["1.delta"].half()}), "must be float32"),
    (lambda m, t: t.update({"1.delta": t["1.delta"].double()}), "must be float32"),
    (lambda m, t: t.update({"1.delta": t["1.delta"].to(torch.float8_e4m3fn)}), "must be float32"),
    (lambda m, t: t.update({"1.delta": t["1.delta"] > 0}), "must be float32"),
    (lambda m, t: t.update({"1.delta": t["1.delta"].reshape(6, 4)}), "was altered"),
    (lambda m, t: t.update({"1.surprise": torch.zeros(1)}), "is damaged"),
    (lambda m, t: t.update({"1.weight": torch.zeros(1)}), "is damaged"),
    (lambda m, t: t.update({"7.delta": torch.zeros(1)}), "tensors that no op names: 7.delta"),
    (lambda m, t: t.update({"surprise": torch.zeros(1)}), "tensors that no op names: surprise"),
    (lambda m, t: t.update({"1": torch.zeros(1)}), "is damaged"),
    (lambda m, t: t.pop("1.delta"), "is damaged"),
    (lambda m, t: t.pop("0.A"), "is damaged"),
    (lambda m, t: m["examples"][0].update(target=""), "is damaged: The target"),
    (lambda m, t: m["examples"][0].update(subject="France"), "is damaged: The subject"),
    (lambda m, t: m["examples"][0].update(surprise=1), "is damaged"),
    (lambda m, t: m["examples"][0].pop("prompt"), "is damaged"),
])  # fmt: skip
def test_a_file_that_was_rewritten_is_refused(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], told: str) -> None:
    refused(rewritten(change), told)


@pytest.mark.parametrize("change, told", [
    (lambda m, t: t["0.shift"].neg_(), "was altered"),
    (lambda m, t: t["0.ids"].add_(1), "was altered"),
    (lambda m, t: t["0.senses"].copy_(torch.tensor([0, 1, 2])), "was altered"),
    (lambda m, t: t["0.shift"][0].fill_(float("nan")), "holds NaN or infinity"),
    (lambda m, t: t.update({"0.shift": t["0.shift"].half()}), "must be float32"),
    (lambda m, t: t.update({"0.shift": t["0.shift"][:2].clone()}), "3 tokens, 3 senses and shifts (2, 5)"),
    (lambda m, t: t.update({"0.ids": t["0.ids"].int()}), "must be one row of int64"),
    (lambda m, t: t.update({"0.ids": t["0.ids"].float()}), "must be one row of int64"),
    (lambda m, t: t["0.senses"].fill_(2), "Sense 2 of token 3 stands in the shifts of 'backpack.overrides.senses' twice"),
    (lambda m, t: t.update({k: v.flip(0) for k, v in t.items()}), "out of order"),
    (lambda m, t: t["0.ids"].neg_(), "both count from 0"),
    (lambda m, t: t.pop("0.senses"), "is damaged"),
    (lambda m, t: t.update({"0.keep": torch.zeros(1)}), "is damaged"),
    (lambda m, t: m["ops"][0].update(kind="Add"), "is damaged"),
    (lambda m, t: m["ops"][0].update(scale=2.0), "says more than errata wrote"),
    (lambda m, t: m["ops"][0].update(weight="backpack.overrides.keep"), "was altered"),
])  # fmt: skip
def test_shifts_of_senses_that_were_rewritten_are_refused(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], told: str
) -> None:
    raw = to_bytes(patch_of(ops=(SHIFTS,)))
    assert rewritten(lambda m, t: None, raw) == raw
    refused(rewritten(change, raw), told)


@pytest.mark.parametrize("change, told", [
    (lambda m, t: t["0.shift"].neg_(), "was altered"),
    (lambda m, t: t["0.shift"][0].fill_(float("inf")), "holds NaN or infinity"),
    (lambda m, t: t.pop("0.ids"), "is damaged"),
    (lambda m, t: t.update({"0.scale": torch.zeros(1)}), "is damaged"),
    (lambda m, t: m["ops"][0].update(scale=1.0), "was altered"),
    (lambda m, t: m["ops"][0].update(scale="x"), "is damaged"),
    (lambda m, t: m["ops"][0].update(small="lab/other"), "was altered"),
    (lambda m, t: m["ops"][0].update(small=""), "needs the name of the small model"),
    (lambda m, t: m["ops"][0].pop("small"), "is damaged"),
    (lambda m, t: m["ops"][0].update(parent="b2:" + "8" * 32), "was altered"),
    (lambda m, t: m["ops"][0].update(senses="w"), "was altered"),
    (lambda m, t: m["ops"][0].update(weight="lm_head"), "was altered"),
    (lambda m, t: m["ops"][0].update(kind="Senses"), "was altered"),
    (lambda m, t: m["ops"][0].update(more=1), "says more than errata wrote"),
])  # fmt: skip
def test_an_ensemble_that_was_rewritten_is_refused(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], told: str) -> None:
    raw = to_bytes(patch_of(ops=(BESIDE,)))
    assert rewritten(lambda m, t: None, raw) == raw
    refused(rewritten(change, raw), told)


def test_metadata_of_others_is_refused() -> None:
    refused(rewritten(lambda m, t: None, format="pt"), "says more than errata wrote")


ODD = st.sampled_from([None, True, 0, -1, 1.5, float("nan"), "", "x", "b2:", [], [0], {}, {"a": 1}, [[]], [None], 10**400, "\x00"])
KEYS = [("format",), ("id",), ("method",), ("config",), ("parent",), ("examples",), ("ops",)]
KEYS += [("examples", 0), *(("examples", 0, k) for k in ("prompt", "target", "contrast", "subject", "goal"))]
KEYS += [("ops", 0), *(("ops", 0, k) for k in ("kind", "weight", "scale"))]


@given(st.sampled_from(KEYS), ODD)
@settings(max_examples=150)
def test_a_value_of_another_kind_is_refused(path: tuple[Any, ...], odd: Any) -> None:
    def change(manifest: Any, _tensors: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        assume(manifest[path[-1]] != odd)
        manifest[path[-1]] = odd

    refused(rewritten(change))


def test_a_value_of_another_kind_is_refused_also_where_no_annotation_is_checked(tmp_path: Path) -> None:
    """As outside the tests, without the run-time checker; and once more as if the id had been made to fit."""
    odd = [None, True, 0, 1.5, "", [], [0], {}, {"a": 1}, ["a"], "\ud83d", 10**400]
    work = []
    for path in [k for k in KEYS if k != ("format",)]:
        for value in odd:
            manifest = at = manifest_of(RAW)
            for key in path[:-1]:
                at = at[key]
            right = {("config",): ({}, {"a": 1}), ("examples",): ([],), ("ops", 0, "scale"): (1.5,), ("id",): odd}
            right |= {("examples", 0, k): (None,) for k in ("contrast", "subject")}
            if value in right.get(path, ()):
                continue  # a right value, which only the id betrays
            at[path[-1]] = value
            work.append(json.dumps(manifest))
    (tmp_path / "work.json").write_text(json.dumps(work))
    (tmp_path / "raw").write_bytes(RAW)
    code = textwrap.dedent(
        """
        import json, sys
        from pathlib import Path
        from errata import artefact, types

        raw = Path("raw").read_bytes()
        for fits in (False, True):
            for text in json.loads(Path("work.json").read_text()):
                header = {"__metadata__": {"errata": text}}
                artefact._header = lambda raw, name: header
                if fits:
                    types.Patch.id = property(lambda self: json.loads(text)["id"])
                try:
                    artefact.from_bytes(raw, "this")
                except types.InvalidPatch:
                    continue
                sys.exit("accepted: " + text)
        print("all refused")
        """
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "all refused" in done.stdout, done.stdout + done.stderr


def test_a_patch_that_nobody_could_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "MAX_HEADER", 2 * HEADER)
    assert same(load_patch(save(PATCH, tmp_path / "x")), PATCH)
    with pytest.raises(InvalidPatch, match="Divide it into several patches"):
        save(patch_of(config={"text": "x" * HEADER}), tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# ---------------------------------------------------------------------------------------------------------------------------- files


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, told in {
        **{
            "empty": "cut short: 0 bytes",
            "none": "No such file",
            "folder": "not a file",
            "pipe": "not a file",
            "empty/x": "Not a directory",
        },
        **{"dangling": "No such file", "loop": "symbolic link", "a\0b": "null", "x" * 300: "too long"},
    }.items():
        with pytest.raises(InvalidPatch, match=told) as caught:
            load_patch(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(PATCH, tmp_path / "x")
    monkeypatch.setattr(artefact, "MAX_BYTES", len(RAW) - 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(InvalidPatch, match=f"{len(RAW)} bytes, over the limit"):
        load_patch(path)


def test_a_link_is_read_through_and_replaced_not_followed(tmp_path: Path) -> None:
    kept, link = save(PATCH, tmp_path / "kept"), tmp_path / "latest"
    link.symlink_to(kept)
    assert same(load_patch(link), PATCH)
    other = patch_of(method="lora")
    save(other, link)
    assert same(load_patch(link), other) and not link.is_symlink()
    assert same(load_patch(kept), PATCH), "what the link pointed to may be somebody's record"


def test_a_file_has_the_rights_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = save(PATCH, tmp_path / "x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("make, told", [
    (lambda d: (d / "x").mkdir(), "directory"),
    (lambda d: None, "null"),
    (lambda d: (d / "x").touch(), ""),
], ids=["a folder", "no name", "a file for a folder"])  # fmt: skip
def test_where_nothing_can_be_written_the_ledger_says_so(tmp_path: Path, make: Callable[[Path], None], told: str) -> None:
    make(tmp_path)
    target = {"directory": tmp_path / "x", "null": tmp_path / "a\0b", "": tmp_path / "x" / "y"}[told]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LedgerError, match=rf"(?s)Cannot write .*{told}.*Nothing was changed"):
        save(PATCH, target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("odd"), KeyboardInterrupt()])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def full(*_: Any) -> None:
        raise error

    path = save(PATCH, tmp_path / "x")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(LedgerError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save(patch_of(method="lora"), path)
    if isinstance(error, OSError):
        assert str(caught.value) == f"Cannot write {path}: {error.strerror or 'odd'}. Nothing was changed."
    monkeypatch.undo()
    assert same(load_patch(path), PATCH) and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_synced_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file stands already; to say that nothing was changed would be wrong."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    path, other = save(PATCH, tmp_path / "x"), patch_of(method="lora")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(LedgerError, match="The file was replaced, but the disk did not confirm it"):
        save(other, path)
    assert same(load_patch(path), other)


def test_the_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync"), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    save(PATCH, tmp_path / "x")
    assert events == ["fsync", "replace", "fsync folder"]


def test_a_new_folder_is_on_the_disk_before_a_file_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss may take the name of a folder whose parent was not synced, and all that is in it."""
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd))[1])
    path = save(PATCH, tmp_path / "a" / "b" / "x")
    assert synced == [place.stat().st_ino for place in (tmp_path, tmp_path / "a", path, path.parent)]
    synced.clear()
    save(PATCH, path.with_name("y"))
    assert synced == [path.with_name("y").stat().st_ino, path.parent.stat().st_ino]


def test_a_reader_sees_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = save(PATCH, tmp_path / "x"), patch_of(method="lora")
    replace = os.replace

    def looked(a: Any, b: Any) -> None:
        assert same(load_patch(path), PATCH)
        replace(a, b)
        assert same(load_patch(path), other)

    monkeypatch.setattr(os, "replace", looked)
    save(other, path)
