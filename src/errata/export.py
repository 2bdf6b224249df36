"""Applied host -> Hugging Face folder or PEFT adapter. What was written is read back from the disk and asked the same question as the
host under the patch; only if both answer alike does the folder get its name. A folder that exists is whole, or it is not there.

`errata.json` beside the weights says what they are: patch, base weights, method and examples. Nothing here judges a patch or keeps one.
"""

import copy
import secrets
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor, nn

from errata import __version__, apply, hosts
from errata.artefact import TEMPORARY, write_whole
from errata.hosts import Batch, Host, stored_transposed
from errata.types import (
    AddLowRank,
    Ensemble,
    InvalidPatch,
    LedgerError,
    Memory,
    MissingExtra,
    Patch,
    Senses,
    UnknownName,
    WrongBase,
    canonical_json,
)

FORMS = ("model", "peft")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # of the logits' spread: an adapter is added after rounding


@final
@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `difference`: largest gap between the logits of the folder and of the patched host, as a share of their spread."""

    folder: Path
    form: str
    patch: str
    nbytes: int
    difference: float


def export(host: Host, patch: Patch, folder: str | Path, form: str = "model") -> Exported:
    """Write `host` under `patch` as a merged Hugging Face folder ("model") or the patch alone as a PEFT adapter ("peft").

    Weights keep the dtype that they have in the host. The host is left as it was.
    Raises WrongBase, InvalidPatch (an adapter holds only low-rank changes of linear modules), MissingExtra, UnknownName, and LedgerError if
    the folder is taken, cannot be written, or does not answer as the patched host does; then nothing is left of it.
    """
    folder = Path(folder).absolute()  # relative, "lab/x" would be read back as one of the lab's models
    if form not in FORMS:
        raise UnknownName.among("form of export", form, FORMS)
    if host.worn:
        raise WrongBase(f"{host.name} wears {len(host.worn)} patch(es). Take them off: an export is the base and one patch.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise LedgerError(f"{folder} is there already and is not an empty folder. Name another one.")
    if beside := next((op for op in patch.ops if isinstance(op, Ensemble)), None):
        raise InvalidPatch(
            f"Patch {patch.id} ({patch.method}) changes no weight of {host.name}: {beside.small} speaks beside it, and neither a model nor "
            f"an adapter can hold two. Keep the patch as a file, and put it on with errata or give its logits processor to `generate`."
        )
    if any(isinstance(op, Memory) for op in patch.ops):
        raise InvalidPatch(
            f"Patch {patch.id} ({patch.method}) changes no weight of {host.name}: it is a memory that answers in its place, and a model "
            f"holds none. Keep the patch as a file, or build its examples with a method that changes weights."
        )
    apply.check(host, patch)
    batch = _question(host, patch)
    with apply.applied(host, patch):
        wanted_NTV = _logits(host, batch)
    draft = folder.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        write: Callable[[Host, Patch, Path], Any] = {"model": _merged, "peft": _adapter}[form]
        draft.mkdir(parents=True)
        read_back = write(host, patch, draft)
        difference = _gap(wanted_NTV, _logits(replace(host, model=read_back), batch))
        if not difference <= TOLERANCE.get(host.model.dtype, 1e-3):  # `not <=`: NaN is a difference
            raise LedgerError(
                f"The exported folder does not answer as {host.name} under patch {patch.id} does: its logits differ by {difference:.2g} of "
                f"their spread. The folder was removed."
            )
        _describe(host, patch, draft, form, difference)
        if folder.is_dir():
            folder.rmdir()
        draft.rename(folder)
    except LedgerError:
        raise
    except (OSError, SafetensorError) as e:  # SafetensorError: its writer meets the full disk first
        raise LedgerError(f"Cannot write {folder}: {getattr(e, 'strerror', None) or e}. Nothing was left of it.") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return Exported(folder=folder, form=form, patch=patch.id, nbytes=nbytes, difference=difference)


def _question(host: Host, patch: Patch) -> Batch:
    """The patch's own examples, and tokens from all over the vocabulary."""
    rows = [hosts.encode(host, e.prompt, e.target) for e in patch.examples[:16]]
    return hosts.pad(host, rows + hosts.random_rows(host, 4, min(64, host.context)))


@torch.no_grad()
def _logits(host: Host, batch: Batch) -> Float[Tensor, "R V"]:
    """(R, V) float32 logits at the R places of `batch` that are no padding."""
    logits_NTV = hosts.logits(host, batch)
    chosen: Tensor = logits_NTV[batch.mask_NT[:, : logits_NTV.shape[1]].bool()].float()
    return chosen


def _gap(wanted_RV: Float[Tensor, "R V"], got_RV: Float[Tensor, "R V"]) -> float:
    return float((wanted_RV - got_RV).abs().max() / wanted_RV.std())


# ------------------------------------------------------------------------------------------------------------------------------ forms


def _merged(host: Host, patch: Patch, draft: Path) -> Any:
    """Writes the merged model and its tokenizer; returns the model as read back."""
    with apply.applied(host, patch):
        host.model.save_pretrained(draft)
        host.tokenizer.save_pretrained(draft)
        merged = hosts.weights_id(host.model)
    try:
        read_back = hosts.load(str(draft), str(host.device), host.model.dtype)
    except WrongBase as e:
        raise LedgerError(f"The exported weights of {host.name} under patch {patch.id} are not all numbers. The folder was removed.") from e
    if read_back.base_id != merged:
        raise LedgerError(f"The exported weights are not those of {host.name} under patch {patch.id}. The folder was removed.")
    return read_back.model


def _adapter(host: Host, patch: Patch, draft: Path) -> Any:
    """Writes a plain LoRA adapter, which is what serving engines read; returns the base with that adapter on, as read back."""
    try:
        import peft
    except ImportError as e:
        raise MissingExtra('An adapter needs PEFT, which is not installed: pip install "errata[export]".') from e
    ops = {op.weight.removesuffix(".weight"): _low_rank(host, patch, op) for op in patch.ops}
    if not ops:
        raise InvalidPatch(f"Patch {patch.id} changes nothing; there is no adapter to write.")
    rank = {name: op.A.shape[0] for name, op in ops.items()}
    alpha = {name: _whole(op.scale * rank[name]) for name, op in ops.items()}
    r, lora_alpha = rank[min(ops)], alpha[min(ops)]
    config = peft.LoraConfig(
        base_model_name_or_path=host.model.name_or_path or host.name,
        # SEQ_CLS would put a classifier of its own beside the model's
        task_type={"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": None}[host.kind],
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern={name: n for name, n in sorted(rank.items()) if n != r},
        alpha_pattern={name: a for name, a in sorted(alpha.items()) if a != lora_alpha},
        target_modules=sorted(ops),
        fan_in_fan_out=any(stored_transposed(host.model.get_submodule(name)) for name in ops),
        bias="none",
        inference_mode=True,
    )
    config.save_pretrained(draft)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": t.contiguous().clone() for name, op in ops.items() for side, t in op.tensors.items()
    }
    said = {"base": patch.parent, "patch": patch.id, "method": patch.method, "version": __version__}
    raw: bytes = bytes_from_tensors(tensors, metadata={"format": "pt", "errata": canonical_json(said)})
    write_whole(draft / "adapter_model.safetensors", raw)
    base = copy.deepcopy(host.model)  # PEFT rebuilds the modules that it adapts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it turns fan_in_fan_out round where a model has both kinds of module, and says so
        read_back = peft.PeftModel.from_pretrained(base, draft, torch_device=str(host.device)).eval()
    for name, op in ops.items():  # in half precision the logits alone would not show a small change that came out wrong
        wanted, got = apply.change(host, op), base.get_submodule(name).get_delta_weight("default").float()
        if not (wanted - got).norm() <= 1e-3 * wanted.norm():
            raise LedgerError(f"The adapter does not change '{op.weight}' as patch {patch.id} does. The folder was removed.")
    return read_back


def _whole(number: float) -> float | int:
    """Serving engines expect the usual alpha to be an integer."""
    return int(number) if number.is_integer() else number


def _low_rank(host: Host, patch: Patch, op: Any) -> AddLowRank:
    """`op`, if a PEFT adapter can hold it. Raises InvalidPatch."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(op, Senses):
        raise InvalidPatch(
            f"Patch {patch.id} ({patch.method}) shifts sense vectors, and an adapter holds only low-rank changes of linear modules. "
            f"Export it as a model: the shifts are part of its checkpoint."
        )
    if not isinstance(op, AddLowRank):
        raise InvalidPatch(
            f"Patch {patch.id} ({patch.method}) changes '{op.weight}' as a whole, and an adapter holds only low-rank changes. "
            f"Export it as a model, or build with --method lora."
        )
    module = host.model.get_submodule(op.weight.removesuffix(".weight"))
    if not (op.weight.endswith(".weight") and isinstance(module, nn.Linear | Conv1D)):
        raise InvalidPatch(
            f"'{op.weight}' of patch {patch.id} belongs to no linear module, so no adapter can hold it. Export it as a model."
        )
    return op


def _describe(host: Host, patch: Patch, draft: Path, form: str, difference: float) -> None:
    said = {
        "form": form,
        "patch": patch.id,
        "base": patch.parent,
        "model": host.name,
        "method": patch.method,
        "config": dict(patch.config),
        "examples": [e.as_dict() for e in patch.examples],
        "dtype": str(host.model.dtype).removeprefix("torch."),
        "difference": difference,
        "version": __version__,
    }
    write_whole(draft / "errata.json", (canonical_json(said) + "\n").encode())
