"""Host = model + tokenizer + id, and the questions that one can ask it: losses, log-probabilities, greedy answers, samples.

`LAYOUTS` holds one row for each model family. Which row is meant is read from the architecture (`config.model_type`), never from the
name of a path. Nothing here changes a weight: `apply.py` does.

Three kinds of host, asked in the same words, a prompt and what should follow it:
    causal       goes on with a text           row: ids of prompt + target
    seq2seq      answers what it has read      row: ids that the encoder reads + ids that the decoder should say, with the end mark
    classifier   gives it one of its labels    row: ids that it reads + the label's number
A row is (ids, how many of them are given). A document of the latter two is `prompt|target`, as an example is written.

File legend: N texts or pairs, S tokens that an encoder reads, T tokens, V vocabulary (of a classifier: its labels).
"""

import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.types import (
    Example,
    InvalidExample,
    InvalidReference,
    MissingExtra,
    Patch,
    Senses,
    State,
    UnknownArchitecture,
    UnknownName,
    WrongBase,
    digest_of,
    tensor_bytes,
)

# --------------------------------------------------------------------------------------------------------------------------- layouts


Kind = Literal["causal", "seq2seq", "classifier"]


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a family keeps its parts. Names of block parts are relative to one block; several names mean unfused projections, and those
    that a model of the family does not have are left out of its host's layout.

    `encoder` is the stack of blocks that reads before this one speaks, `across` what reads its output here. `senses` is the table of
    shifted sense vectors, which only a Backpack has.
    """

    kind: Kind = "causal"

    blocks: str
    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    norm: str
    embedding: str
    head: str
    senses: str | None = None
    encoder: "Layout | None" = None
    across: tuple[str, ...] = ()


def _llama_like(
    attention_in: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"), mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
) -> Layout:
    return Layout(
        blocks="model.layers",
        attention_in=tuple(f"self_attn.{n}" for n in attention_in),
        attention_out="self_attn.o_proj",
        mlp_in=tuple(f"mlp.{n}" for n in mlp_in),
        mlp_out="mlp.down_proj",
        norm="model.norm",
        embedding="model.embed_tokens",
        head="lm_head",
    )


def _t5_stack(stack: str, mlp: int, encoder: Layout | None = None) -> Layout:
    across = () if encoder is None else tuple(f"layer.1.EncDecAttention.{n}" for n in "qkvo")
    return Layout(
        kind="seq2seq",
        blocks=f"{stack}.block",
        attention_in=(*(f"layer.0.SelfAttention.{n}" for n in "qkv"), *across),
        attention_out="layer.0.SelfAttention.o",
        mlp_in=tuple(f"layer.{mlp}.DenseReluDense.{n}" for n in ("wi", "wi_0", "wi_1")),  # one, or two that are multiplied
        mlp_out=f"layer.{mlp}.DenseReluDense.wo",
        norm=f"{stack}.final_layer_norm",
        embedding="shared",
        head="lm_head",
        encoder=encoder,
        across=across[1:3],
    )


_BERT = Layout(
    kind="classifier",
    blocks="bert.encoder.layer",
    attention_in=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_out="attention.output.dense",
    mlp_in=("intermediate.dense",),
    mlp_out="output.dense",
    norm="bert.embeddings.LayerNorm",  # the last block has its own
    embedding="bert.embeddings.word_embeddings",
    head="classifier",
)
_LLAMA = _llama_like()
_T5 = _t5_stack("decoder", 2, encoder=_t5_stack("encoder", 1))
LAYOUTS: dict[str, Layout] = {
    "backpack": Layout(  # its trunk; the sense network beside it has no blocks
        blocks="backpack.gpt2_model.h",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norm="backpack.gpt2_model.ln_f",
        embedding="backpack.gpt2_model.wte",
        head="lm_head",
        senses="backpack.overrides",
    ),
    "bert": _BERT,
    "gpt2": Layout(
        blocks="transformer.h",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norm="transformer.ln_f",
        embedding="transformer.wte",
        head="lm_head",
    ),
    "gpt_neo": Layout(
        blocks="transformer.h",
        attention_in=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        attention_out="attn.attention.out_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norm="transformer.ln_f",
        embedding="transformer.wte",
        head="lm_head",
    ),
    "gptj": Layout(
        blocks="transformer.h",
        attention_in=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        attention_out="attn.out_proj",
        mlp_in=("mlp.fc_in",),
        mlp_out="mlp.fc_out",
        norm="transformer.ln_f",
        embedding="transformer.wte",
        head="lm_head",
    ),
    "gpt_neox": Layout(
        blocks="gpt_neox.layers",
        attention_in=("attention.query_key_value",),
        attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        norm="gpt_neox.final_layer_norm",
        embedding="gpt_neox.embed_in",
        head="lm_head",
    ),
    "opt": Layout(
        blocks="model.decoder.layers",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.out_proj",
        mlp_in=("fc1",),
        mlp_out="fc2",
        norm="model.decoder.final_layer_norm",
        embedding="model.decoder.embed_tokens",
        head="lm_head",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi": Layout(
        blocks="model.layers",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        norm="model.final_layernorm",
        embedding="model.embed_tokens",
        head="lm_head",
    ),
    "phi3": _llama_like(attention_in=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "mt5": _T5,
    "t5": _T5,
}


def _present(row: Layout, model: nn.Module) -> Layout:
    """The row without the projections that this model does not have."""
    first = model.get_submodule(f"{row.blocks}.0")
    there = {name for name, _ in first.named_modules()}
    encoder = row.encoder and _present(row.encoder, model)
    return replace(row, mlp_in=tuple(n for n in row.mlp_in if n in there), encoder=encoder)


def require_causal(host: "Host", what: str) -> None:
    """Raises UnknownArchitecture for a host that does not go on with a text."""
    if host.kind != "causal":
        raise UnknownArchitecture(f"{what} works on models that go on with a text; {host.name} is a {host.kind}. Take another method.")


def senses_of(host: "Host") -> str:
    """Where the host keeps shifted sense vectors: the name that a `Senses` op uses. Raises UnknownArchitecture if it has no senses."""
    if host.layout.senses is None:
        raise UnknownArchitecture(
            f"{host.name} is no Backpack: its tokens have no sense vectors. Take a Backpack language model, or another method."
        )
    return f"{host.layout.senses}.senses"


def stored_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as (in, out): transformers' Conv1D does, torch's Linear keeps (out, in)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


# ------------------------------------------------------------------------------------------------------------------------------ host

LAB_MODELS = Path(__file__).parent / "lab" / "models"


@final
@dataclass(frozen=True, kw_only=True)
class Said:
    """What a speaker says of one row of a batch: (P, V) logits that take the place of the model's own at the positions from `start` on."""

    row: int
    start: int
    logits_PV: Tensor


@runtime_checkable
class Speaker(Protocol):
    """What answers in a model's place where it is concerned (an edit memory: `memory/route.py`). While `silent`, the model is alone."""

    silent: bool

    def said(self, batch: "Batch", own: Callable[[int, int, int], Tensor]) -> list[Said]:
        """What it says of the rows of `batch` that it concerns. `own(row, start, P)` gives the model's own logits there, (P, V)."""
        ...

    def remove(self) -> None:
        """It says nothing from now on."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Worn:
    """One patch that is on, and what it replaced: the tensor that each parameter held before, and a Backpack's table of shifted senses.
    `hooks` are those through which a small model speaks, `speakers` what answers in the model's place."""

    patch: Patch
    replaced: dict[nn.Parameter, Tensor]
    table: tuple[Tensor, Tensor, Tensor] | None = None
    hooks: tuple[RemovableHandle, ...] = ()
    speakers: tuple[Speaker, ...] = ()


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A language model, or a classifier of texts, with its tokenizer. Make one with `load` or `host_of`.

    `id` is the hash of the weights as loaded, and the patch's id while a patch is on. `worn` is the stack of patches that are on;
    only `apply.py` writes it. `beside` are small models of ensembles, by the names that patches call them (see `beside`). `states` are
    those that patches of an edit memory speak through, by their ids, and `readers` what was made of them. `recalled` is what it said as it
    was loaded, by what it was asked (see `remembered`); None where nobody will ask for the same again.
    """

    model: Any
    tokenizer: Any
    base_id: str
    layout: Layout
    name: str
    worn: list[Worn] = field(default_factory=list)
    beside: dict[str, "Host"] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    readers: dict[str, Any] = field(default_factory=dict)
    recalled: dict[Hashable, Any] | None = None

    @property
    def speakers(self) -> list[Speaker]:
        """Those of all patches that are on, the undermost first."""
        return [speaker for worn in self.worn for speaker in worn.speakers]

    @property
    def id(self) -> str:
        return self.worn[-1].patch.id if self.worn else self.base_id

    @property
    def kind(self) -> Kind:
        return self.layout.kind

    @property
    def device(self) -> torch.device:
        """Where inputs go; of a model that is split, where its first part is that stays on a device."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), None) or find_device()

    @property
    def context(self) -> int:
        """Longest input in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def blocks(self) -> int:
        return len(self.model.get_submodule(self.layout.blocks))

    def module_names(self, parts: Sequence[str], layers: Sequence[int] | None = None) -> list[str]:
        """Full names of block parts, e.g. `module_names(host.layout.mlp_in)`, in all blocks or those listed."""
        return [f"{self.layout.blocks}.{i}.{part}" for i in (range(self.blocks) if layers is None else layers) for part in parts]

    @property
    def last_mlp(self) -> str | None:
        """The last block's MLP: it takes each token by itself, and only what it gives where an answer is predicted counts. None where it is
        no module of its own, or where all tokens count behind it (a Backpack's)."""
        found = {part.rpartition(".")[0] for part in (*self.layout.mlp_in, self.layout.mlp_out)}
        own = found.pop() if len(found) == 1 and not self.layout.senses else ""
        return self.module_names([own], [self.blocks - 1])[0] if own else None

    def stacks(self) -> list[tuple[Layout, int]]:
        """(layout, number of blocks) of each stack, in the order in which a text goes through them."""
        row = self.layout
        return [(s, len(self.model.get_submodule(s.blocks))) for s in ([row.encoder] if row.encoder else []) + [row]]

    def projections(self, *which: str) -> list[str]:
        """Full names of the attention and MLP projections of every block; `which` picks some of a layout's fields."""
        fields = which or ("attention_in", "attention_out", "mlp_in", "mlp_out")
        out = []
        for row, blocks in self.stacks():
            found = [getattr(row, name) for name in fields]
            parts = [part for names in found for part in ([names] if isinstance(names, str) else names)]
            out += [f"{row.blocks}.{i}.{part}" for i in range(blocks) for part in parts]
        return out


def weights_id(model: nn.Module) -> str:
    """Hash of every parameter, tied ones once, and of the buffers that are saved with them (a Backpack's overridden senses).

    Taken over float32 values, so that bf16 weights loaded as float32 keep their id.
    """
    saved = model.state_dict()
    buffers = ((name, b) for name, b in model.named_buffers() if name in saved)

    def parts() -> Iterator[bytes | str]:
        yield "weights"
        twice = _tied(model)
        for name, p in sorted([*model.named_parameters(), *buffers], key=lambda named: named[0]):
            if name in twice:
                continue
            yield from (name, str(tuple(p.shape)), tensor_bytes((weight(model, name) if p.is_meta else p).float()))

    return digest_of(parts())


def _tied(model: Any) -> Mapping[str, str]:
    """{name of a parameter: the name under which it counts} in a model that is split: there the two are no longer one tensor."""
    tied: Mapping[str, str] = model.all_tied_weights_keys if hasattr(model, "hf_device_map") else {}
    return tied


def weight(model: nn.Module, name: str) -> Tensor:
    """The values of a parameter, also of one that a model which is split keeps elsewhere and reads when it is used. They ask for no
    gradient, and are not to be written to."""
    kept = model.get_parameter(name)
    if not kept.is_meta:
        return kept.detach()
    from accelerate.utils import align_module_device

    module, _, own = name.rpartition(".")
    part = model.get_submodule(module)
    with align_module_device(part):
        read: Tensor = getattr(part, own).detach()
    return read


AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classifier": "AutoModelForSequenceClassification",
}


def host_of(model: Any, tokenizer: Any, name: str = "") -> Host:
    """Host around a Hugging Face model that is in memory already. Dropout is switched off (`eval`).

    Raises UnknownArchitecture, with the known ones and how to add a row.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise UnknownArchitecture(
            f"No layout for the architecture '{kind}'. Known: {', '.join(sorted(LAYOUTS))}. "
            f"To add it, write one row in LAYOUTS in errata/hosts.py that names its blocks, projections, norm, embedding and head."
        )
    if LAYOUTS[kind].kind == "classifier" and getattr(model.config, "problem_type", None) == "multi_label_classification":
        raise UnknownArchitecture(f"{name or kind} gives a text several labels at once; only models that give it one can be edited.")
    try:
        layout = _present(LAYOUTS[kind], model)
        model.get_submodule(layout.head)
    except AttributeError as e:
        raise UnknownArchitecture(
            f"{type(model).__name__} is a '{kind}' without what is edited there ({e}). Load it with {AUTO[LAYOUTS[kind].kind]}."
        ) from e
    model.eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return Host(model=model, tokenizer=tokenizer, base_id=weights_id(model), layout=layout, name=name or kind)


def find_device(device: str | None = None) -> torch.device:
    """The device asked for, or the best one present: cuda, mps, cpu. Raises UnknownName if this machine does not have it."""
    present = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if not device:
        return torch.device(present[0])
    if device.partition(":")[0] not in present:
        raise UnknownName.among("device", device, present)
    return torch.device(device)


def load(name: str, device: str | None = None, dtype: torch.dtype | None = None, device_map: str | Mapping[str, Any] | None = None) -> Host:
    """Host from `lab/neox`, a local Hugging Face folder, or a hub id. float32 on a CPU, the checkpoint's own dtype elsewhere.

    `device_map` splits a model that is larger than one device, by accelerate: "auto", or {module: a device, "cpu" or "disk"}. What is on
    the disk, or on the CPU beside a GPU, is read whenever it is used. It can be asked, and rows can be taken on it, as if it were whole;
    a patch can be put on those of its weights alone that stay where they are used.

    Raises UnknownName if there is no such model, UnknownArchitecture if there is no layout for it, WrongBase if a weight is not finite,
    MissingExtra if it is to be split without accelerate.
    """
    split = _split(device_map)
    try:
        return _load(name, device, dtype, split)
    except BaseException:
        if split:
            shutil.rmtree(split["offload_folder"], ignore_errors=True)
        raise


def _load(name: str, device: str | None, dtype: torch.dtype | None, split: dict[str, Any]) -> Host:
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    from errata.models.backpack import CheckpointError  # (the import makes the architecture known to transformers)

    path = name
    if name.startswith("lab/"):
        known = sorted(f"lab/{p.name}" for p in LAB_MODELS.glob("*/") if p.is_dir())
        if name not in known:
            raise UnknownName.among("lab model", name, known)
        path = str(LAB_MODELS / name.removeprefix("lab/"))
    place = find_device(device)
    logging.disable_progress_bar()  # ours are drawn at the edge
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        family = AutoConfig.from_pretrained(path).model_type
        auto = getattr(transformers, AUTO[LAYOUTS[family].kind if family in LAYOUTS else "causal"])
        model, read = auto.from_pretrained(
            path, dtype=dtype or (torch.float32 if place.type == "cpu" else "auto"), output_loading_info=True, **split
        )
    except CheckpointError as e:
        raise UnknownName(f"Cannot load '{name}': {e}") from e
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:  # RuntimeError: shapes that the config does not give
        if "model type" in str(e) or "Unrecognized configuration" in str(e):
            raise UnknownArchitecture(f"'{name}' is not a language model that transformers can load: {e}") from e
        if split and not isinstance(e, OSError):
            raise UnknownName(f"Cannot load '{name}' with this device map: {str(e).rstrip('.')}. Give each part cpu, disk or a GPU.") from e
        where = (
            "an existing folder without a whole model in it" if Path(path).is_dir() else "no folder here, and no model that the hub gave"
        )
        raise UnknownName(f"Cannot load '{name}': {where}. Give lab/neox, a Hugging Face folder, or a hub id.") from e
    if missing := sorted(read["missing_keys"]):  # transformers would go on with random ones
        raise UnknownName(f"Cannot load '{name}': {len(missing)} of its weights are not in the files, among them {missing[0]}.")
    for parameter, _ in model.named_parameters():
        if not weight(model, parameter).isfinite().all():
            raise WrongBase(f"The weights of {name} are damaged: '{parameter}' holds NaN or infinity. Load a sound copy.")
    if split:
        weakref.finalize(model, shutil.rmtree, split["offload_folder"], ignore_errors=True)
        model.requires_grad_(False)  # else what is read when it is used would be a leaf of every graph
    return host_of(model if split else model.to(place), tokenizer, name)


def _split(device_map: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """What `from_pretrained` is to be told of it; the folder takes what is on the disk in another precision than the model's files."""
    if device_map is None:
        return {}
    try:
        import accelerate  # noqa: F401
    except ImportError as e:
        raise MissingExtra('To split a model needs accelerate, which is not installed: pip install "errata[large]".') from e
    plain = device_map if isinstance(device_map, str) else dict(device_map)
    return {"device_map": plain, "offload_folder": tempfile.mkdtemp(prefix="errata-")}


def beside(host: Host, name: str) -> Host:
    """The small model called `name` that speaks beside the host: the one in `host.beside`, else loaded, and kept there.

    It is float32, for its small differences count. Raises WrongBase if the two do not have the same tokens, and what `load` raises.
    """
    if name not in host.beside:
        host.beside[name] = load(name, str(host.device), torch.float32)
    small = host.beside[name]
    ours, theirs = ({i: token for token, i in h.tokenizer.get_vocab().items()} for h in (host, small))
    # tokens that were added to one of the two alone, for padding or later use, do not stand in text
    added = {*host.tokenizer.get_added_vocab().values(), *small.tokenizer.get_added_vocab().values()}
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i) and not (i in added and (i not in ours or i not in theirs)):
            raise WrongBase(
                f"{host.name} and {small.name} have different tokenizers: {_known(ours, i)} in {host.name}, {_known(theirs, i)} in "
                f"{small.name}. An ensemble needs a small model that reads the same tokens."
            )
    return small


def _known(vocabulary: dict[int, str], i: int) -> str:
    return f"token {i} is {vocabulary[i]!r}" if i in vocabulary else f"there is no token {i}"


# ------------------------------------------------------------------------------------------------------------------------- questions


T = TypeVar("T")


def remembered(host: Host, asked: Hashable, say: Callable[[], T]) -> T:
    """`say()`, a function of the host's own weights and of `asked` alone; where the host recalls and has no patch on, it is asked once."""
    if host.recalled is None or host.worn:
        return say()
    if asked not in host.recalled:
        host.recalled[asked] = say()
    said: T = host.recalled[asked]
    return said


def tokens(host: Host, text: str) -> list[int]:
    """Ids of `text` with the special tokens that the tokenizer puts in front by default. Those it puts behind (</s>) would end the
    text before its continuation, so they are left out, unless the text is read whole before the answer."""
    (ids,) = tokens_of(host, [text])
    return ids


def tokens_of(host: Host, texts: Sequence[str]) -> list[list[int]]:
    """`tokens` of each text: the tokenizer is several times as fast where it is given them together."""
    if not texts:
        return []
    if host.kind != "causal":
        return [list(ids) for ids in host.tokenizer(list(texts))["input_ids"]]
    given, out = host.tokenizer(list(texts), return_special_tokens_mask=True), []
    for ids, added in zip(given["input_ids"], given["special_tokens_mask"], strict=True):
        end = max((i + 1 for i, special in enumerate(added) if not special), default=min(1, len(ids)))
        out.append(list(ids[:end]))
    return out


def _following(host: Host, prompt_ids: list[int], target: str, whole: list[int]) -> list[int]:
    """Ids that, put behind `prompt_ids`, give the text of `whole`, where the tokenizer itself would merge across the border.

    SentencePiece puts a space before a text of its own, so the target is also read behind an anchor that it does not merge with.
    """

    def bare(text: str) -> list[int]:
        return list(host.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text_of(ids: list[int]) -> str:
        return str(host.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    wanted = text_of(whole)
    for anchor in ("", "\n", ".", "a", "|"):
        ids, n = bare(anchor + target), len(bare(anchor))
        if ids[:n] == bare(anchor) and text_of(prompt_ids + ids[n:]) == wanted:
            return ids[n:]
    raise InvalidExample(
        f"The tokenizer of {host.name} cannot cut '{text_of(whole)}' before '{target}'. Let the prompt end where a word ends, and the "
        f"target begin with the space."
    )


def encode(host: Host, prompt: str, target: str) -> tuple[list[int], int]:
    """Ids of the exact string `prompt + target`, and how many of them are the prompt.

    The prompt keeps the tokens that it has alone, for that is how it is asked. Where the tokenizer would merge across the border, or
    would put a space before a separate target (SentencePiece), the target's ids are found as what must follow for the text to come out.
    A seq2seq's target begins where its decoder does and ends with the end mark; a classifier's is one of its labels.
    Raises InvalidExample if nothing is left of the target, if it is no label, or if it does not fit the context.
    """
    if host.kind != "causal":
        return _read_and_said(host, prompt, target)
    prompt_ids, whole = tokens(host, prompt), tokens(host, prompt + target)
    n = len(prompt_ids)
    if whole[:n] != prompt_ids:
        whole = prompt_ids + _following(host, prompt_ids, target, whole)
    if len(whole) == n:
        raise InvalidExample(f"The target '{target}' of '{prompt}' becomes no token in the tokenizer of {host.name}.")
    if len(whole) > host.context:
        raise InvalidExample(
            f"'{prompt[:60]}…' and its target are {len(whole)} tokens long; {host.name} reads at most {host.context}. Shorten the prompt."
        )
    return whole, n


def labels(host: Host) -> list[str]:
    """What a classifier may say, in the order of its logits."""
    named = host.model.config.id2label
    return [str(named[i]) for i in range(len(named))]


def _read_and_said(host: Host, prompt: str, target: str) -> tuple[list[int], int]:
    read = tokens(host, prompt)
    if host.kind == "classifier":
        known = labels(host)
        if target.strip() not in known:
            raise InvalidExample(f"'{target.strip()}' is no label of {host.name}; it has {', '.join(known)}.")
        said = [known.index(target.strip())]
    else:
        said = list(host.tokenizer(text_target=target, add_special_tokens=False)["input_ids"])
        if not said:
            raise InvalidExample(f"The target '{target}' of '{prompt}' becomes no token in the tokenizer of {host.name}.")
        said.append(host.tokenizer.eos_token_id)
    if not read or max(len(read), len(said)) > host.context:
        size = f"becomes {len(read)} tokens; {host.name} reads 1 to {host.context}"
        raise InvalidExample(f"'{prompt[:60]}' {size}, and answers in as many. Give another prompt.")
    return read + said, len(read)


Weights = dict[str, Tensor]  # values of parameters, by name


@final
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded sequences. `scored_NT` marks the tokens whose log-probability counts; position 0 never does.

    Where a text is read before it is answered, (N, S) is the text, and (N, T) is the decoder's start mark, or a filling, and the answer.
    """

    ids_NT: Int[Tensor, "N T"]
    mask_NT: Int[Tensor, "N T"]
    scored_NT: Float[Tensor, "N T"]
    read_NS: Int[Tensor, "N S"] | None = None
    seen_NS: Int[Tensor, "N S"] | None = None

    def to(self, device: torch.device) -> "Batch":
        given = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return Batch(**{name: t.to(device) for name, t in given if t is not None})


def pad(host: Host, rows: Sequence[tuple[list[int], int]]) -> Batch:
    """One batch of (ids, how many of them are given): the rest is scored. Right padding under a causal mask changes nothing."""
    if host.kind != "causal":
        return _pad_both(host, rows)
    width = max(len(ids) for ids, _ in rows)
    ids_NT = torch.full((len(rows), width), host.tokenizer.pad_token_id, dtype=torch.long)
    mask_NT, scored_NT = torch.zeros_like(ids_NT), torch.zeros(ids_NT.shape)
    for i, (ids, given) in enumerate(rows):
        ids_NT[i, : len(ids)] = torch.tensor(ids)
        mask_NT[i, : len(ids)] = 1
        scored_NT[i, max(given, 1) : len(ids)] = 1
    return Batch(ids_NT=ids_NT, mask_NT=mask_NT, scored_NT=scored_NT).to(host.device)


def _pad_both(host: Host, rows: Sequence[tuple[list[int], int]]) -> Batch:
    start = host.model.config.decoder_start_token_id if host.kind == "seq2seq" else 0
    said = pad_right([[start, *ids[given:]] for ids, given in rows], host.tokenizer.pad_token_id)
    mask_NT = pad_right([[1] * (1 + len(ids) - given) for ids, given in rows])
    scored_NT = mask_NT.float()
    scored_NT[:, 0] = 0
    read = pad_right([ids[:given] for ids, given in rows], host.tokenizer.pad_token_id)
    seen = pad_right([[1] * given for _, given in rows])
    return Batch(ids_NT=said, mask_NT=mask_NT, scored_NT=scored_NT, read_NS=read, seen_NS=seen).to(host.device)


def pad_right(rows: Sequence[list[int]], fill: int = 0) -> Int[Tensor, "N T"]:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def unscored(batch: Batch) -> Batch:
    """The same texts with nothing for the head to do."""
    return replace(batch, scored_NT=torch.zeros_like(batch.scored_NT))


def reads(host: Host, module: str) -> bool:
    """Whether the module's inputs are those of a text that is answered later."""
    encoder, across = host.layout.encoder, tuple(f".{part}" for part in host.layout.across)
    return host.kind == "classifier" or (encoder is not None and (module.startswith(f"{encoder.blocks}.") or module.endswith(across)))


def places(host: Host, batch: Batch, module: str) -> Bool[Tensor, "N T"]:
    """(N, T) which of a module's positions are tokens, no padding; (N, S) if it `reads`."""
    mask = batch.seen_NS if reads(host, module) else batch.mask_NT
    assert mask is not None, "such a host reads before it answers"
    return mask.bool()


@contextmanager
def alone(host: Host) -> Iterator[None]:
    """Inside the block no memory speaks: what the model says by itself."""
    were = [(speaker, speaker.silent) for speaker in host.speakers]
    try:
        for speaker, _ in were:
            speaker.silent = True
        yield
    finally:
        for speaker, silent in were:
            speaker.silent = silent


def logits(host: Host, batch: Batch, weights: Weights | None = None) -> Float[Tensor, "N T V"]:
    """(N, T, V) next-token logits, (N, 1, V) of labels; with `weights`, as if those parameters had these values. The model itself is not
    touched. What a memory says counts behind the given part of each row."""
    logits_NTV = _own_logits(host, batch, weights)
    for speaker in (s for s in host.speakers if not s.silent):

        def own(row: int, start: int, P: int, whole_NTV: Tensor = logits_NTV) -> Tensor:
            return whole_NTV[row, start : start + P]

        said = speaker.said(batch, own)
        logits_NTV = logits_NTV.clone() if said else logits_NTV
        for one in said:
            logits_NTV[one.row, one.start : one.start + len(one.logits_PV)] = one.logits_PV.to(logits_NTV)
    return logits_NTV


def _own_logits(host: Host, batch: Batch, weights: Weights | None) -> Float[Tensor, "N T V"]:
    given: dict[str, Any] = {"input_ids": batch.ids_NT, "attention_mask": batch.mask_NT, "use_cache": False}
    if host.kind != "causal":
        given = {"input_ids": batch.read_NS, "attention_mask": batch.seen_NS}
    if host.kind == "seq2seq":
        given |= {"decoder_input_ids": batch.ids_NT, "decoder_attention_mask": batch.mask_NT, "use_cache": False}
    with alone(host):
        if weights is None:
            said = host.model(**given)
        else:
            with _instead(host.model, weights) as others:
                said = torch.func.functional_call(host.model, others, args=(), kwargs=given)
    logits_NTV: Tensor = said.logits
    return logits_NTV.unsqueeze(1) if host.kind == "classifier" else logits_NTV


@contextmanager
def _instead(model: nn.Module, weights: Weights) -> Iterator[Weights]:
    """Inside the block, those parameters of a model that is split which are read when they are used have the values of `weights` instead;
    yields the others. A stand-in for what is elsewhere, as `named_parameters` gives it, means what is there."""
    if not hasattr(model, "hf_device_map"):
        yield weights
        return
    given = {**weights, **{name: weights[counts] for name, counts in _tied(model).items() if counts in weights}}
    elsewhere = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta} & given.keys()
    own: dict[str, dict[str, Tensor]] = {}
    for name in elsewhere:
        if not given[name].is_meta:
            module, _, parameter = name.rpartition(".")
            own.setdefault(module, {})[parameter] = given[name]
    with ExitStack() as put:
        for module, values in own.items():
            put.enter_context(_valued(model.get_submodule(module), values))
        yield {name: value for name, value in given.items() if name not in elsewhere}


@contextmanager
def _valued(module: Any, values: Weights) -> Iterator[None]:
    """Accelerate reads the module's parameters and then calls `_old_forward`: behind the one and before the other is the place for others.
    (Values given before, as `functional_call` does it, would be overwritten, and nobody would be told.)"""
    forward = module._old_forward

    def valued(*given: Any, **named: Any) -> Any:
        read = {name: module._parameters[name] for name in values}
        module._parameters.update(values)
        try:
            return forward(*given, **named)
        finally:
            module._parameters.update(read)

    module._old_forward = valued
    try:
        yield
    finally:
        module._old_forward = forward


def predictions(host: Host, batch: Batch, weights: Weights | None = None) -> Float[Tensor, "P V"]:
    """(P, V) logits, float32 or better, that predict each scored token, row after row.

    The head runs at those positions only: with a large vocabulary it is most of the work, and a prompt has nothing to score.
    """
    scored_NT = batch.scored_NT.bool()
    if host.kind == "classifier":  # its head is small, and sees what was pooled of a text
        labels_NV = logits(host, batch, weights)[:, 0][scored_NT[:, 1]]
        return labels_NV.to(torch.promote_types(labels_NV.dtype, torch.float32))

    def pick(_head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][:, :-1][scored_NT[:, 1:]].unsqueeze(0), *given[1:])

    handle = host.model.get_submodule(host.layout.head).register_forward_pre_hook(pick)
    try:
        logits_PV = _own_logits(host, batch, weights).squeeze(0)
    finally:
        handle.remove()
    logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    return _with_said(host, batch, logits_PV) if host.speakers else logits_PV


def _with_said(host: Host, batch: Batch, logits_PV: Float[Tensor, "P V"]) -> Float[Tensor, "P V"]:
    """The predictions with what memories say in their places."""
    scored_NT = batch.scored_NT.bool()
    place_NT = torch.full(scored_NT.shape, -1, device=scored_NT.device)  # which of the P predictions is made at a position
    place_NT[:, :-1][scored_NT[:, 1:]] = torch.arange(len(logits_PV), device=scored_NT.device)

    for speaker in (s for s in host.speakers if not s.silent):

        def own(row: int, start: int, P: int, whole_PV: Tensor = logits_PV) -> Tensor:
            return whole_PV[place_NT[row, start : start + P].clamp(min=0)]  # where nothing is predicted, nobody looks

        said = speaker.said(batch, own)
        logits_PV = logits_PV.clone() if said else logits_PV
        for one in said:
            at_P = place_NT[one.row, one.start : one.start + len(one.logits_PV)]
            logits_PV[at_P[at_P >= 0]] = one.logits_PV[at_P >= 0].to(logits_PV)
    return logits_PV


def scored_logprobs(host: Host, batch: Batch, weights: Weights | None = None) -> Float[Tensor, "N T"]:
    """(N, T) log p(token t | tokens before t), zero where `batch.scored_NT` is zero. Softmax in float32 or better."""
    where_NT = batch.scored_NT.bool()
    logp_P = torch.log_softmax(predictions(host, batch, weights), dim=-1).gather(-1, batch.ids_NT[where_NT].unsqueeze(1)).squeeze(1)
    return torch.zeros_like(batch.scored_NT, dtype=logp_P.dtype).masked_scatter(where_NT, logp_P)


def random_rows(host: Host, n: int, width: int) -> list[tuple[list[int], int]]:
    """Rows of `width` tokens from all over the vocabulary, always the same; where they are read first, with something said to them."""
    draw, vocabulary = torch.Generator().manual_seed(0), host.model.get_input_embeddings().num_embeddings
    read = [torch.randint(vocabulary, (width,), generator=draw).tolist() for _ in range(n)]
    if host.kind == "causal":
        return [(ids, 1) for ids in read]
    said = [0] if host.kind == "classifier" else torch.randint(vocabulary, (width // 4 + 1,), generator=draw).tolist()
    return [(ids + said, width) for ids in read]


def by_length(rows: Sequence[tuple[list[int], int]], max_tokens: int) -> Iterator[list[int]]:
    """Groups of indices of (ids, given) rows, the shortest rows first: each index once, rows of similar length together.

    A group padded to its longest row has at most `max_tokens` tokens, unless it is a single longer row.
    """
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0])):
        if group and len(rows[i][0]) * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


LOGITS_BYTES = 16 << 20  # of one pass that only reads: with more of them memory comes fresh from the system, and that is slower


def at_once(host: Host) -> int:
    """Tokens of one pass that only reads: their logits take `LOGITS_BYTES`, or more where that would be fewer than 512 tokens."""
    return min(4096, max(512, LOGITS_BYTES // (4 * int(host.model.config.vocab_size))))


@torch.no_grad()
def score(
    host: Host, rows: Sequence[tuple[list[int], int]], weights: Weights | None = None, max_tokens: int | None = None
) -> Float[Tensor, "N 2"]:
    """(N, 2) float64: summed log-probability of the scored tokens of each row, and how many they are.

    `max_tokens` of a pass, padding included, are `at_once` by default; they change no more than the last digits.
    """
    out_N2 = torch.zeros(len(rows), 2, dtype=torch.float64)
    for group in by_length(rows, max_tokens or at_once(host)):
        batch = pad(host, [rows[i] for i in group])
        logp_NT = scored_logprobs(host, batch, weights)
        out_N2[group] = torch.stack([logp_NT.double().sum(1), batch.scored_NT.double().sum(1)], dim=1).cpu()
    return out_N2


def base_score(host: Host, rows: Sequence[tuple[list[int], int]]) -> Float[Tensor, "N 2"]:
    """`score` of the host as it is, `remembered`. Not to be written to."""
    return remembered(host, ("score", *((given, *ids) for ids, given in rows)), lambda: score(host, rows))


def logprobs(host: Host, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, "N 2"]:
    """(N, 2) float64: log p(target | prompt) summed over the target's tokens, and how many they are."""
    return score(host, [encode(host, prompt, target) for prompt, target in pairs])


def chunks(host: Host, texts: Sequence[str], size: int = 128) -> list[tuple[list[int], int]]:
    """Rows for `score`: every document cut into pieces of at most `size` tokens; pieces of one token have nothing to score.

    Where a text is read before it is answered, a document is a prompt and its answer, in one piece. Raises InvalidReference for others.
    """
    if host.kind != "causal":
        return [_document(host, t) for t in texts]
    size = min(size, host.context)
    pieces = [ids[i : i + size] for ids in tokens_of(host, texts) for i in range(0, len(ids), size)]
    return [(piece, 1) for piece in pieces if len(piece) > 1]


def _document(host: Host, document: str) -> tuple[list[int], int]:
    prompt, bar, answer = document.rpartition("|")
    if not bar:
        raise InvalidReference(f"{host.name} reads a text and answers it: '{document[:60]}' has no answer. Write each as prompt|answer.")
    try:
        return encode(host, prompt, answer)
    except InvalidExample as e:
        raise InvalidReference(f"The reference text does not serve: {e}") from e


@contextmanager
def _plain_decoding(model: Any) -> Iterator[None]:
    """The checkpoint's own taste (repetition penalty, beams, top-p, forced tokens) is set aside: we ask for the model's distribution.
    `generate` fills what it is not told from `model.generation_config`, so that is what has to give way."""
    from transformers import GenerationConfig

    taste = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=taste.bos_token_id,
        eos_token_id=taste.eos_token_id,
        pad_token_id=taste.pad_token_id,
        decoder_start_token_id=taste.decoder_start_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = taste


@torch.no_grad()
def _generate(host: Host, prompts: Sequence[str], max_new_tokens: int, batch_size: int, **how: Any) -> list[str]:
    out = [""] * len(prompts)
    given = tokens_of(host, prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(given[i]))
    if order and not given[order[0]]:
        raise InvalidExample(f"The prompt '{prompts[order[0]]}' becomes no token in the tokenizer of {host.name}.")
    room = max_new_tokens if host.kind == "causal" else 0
    if order and (longest := len(given[order[-1]])) + room > host.context:
        raise InvalidExample(f"A prompt of {longest} tokens and {max_new_tokens} new ones do not fit the {host.context} of {host.name}.")

    def text_of(ids: list[int]) -> str:
        return str(host.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        if host.kind != "causal":
            read = [given[i] for i in group]
            for i, text in zip(group, _answers(host, read, max_new_tokens, **how), strict=True):
                out[i] = text
            continue
        width = max(len(given[i]) for i in group)
        ids_NT = torch.full((len(group), width), host.tokenizer.pad_token_id, dtype=torch.long)
        mask_NT = torch.zeros_like(ids_NT)
        for row, i in enumerate(group):  # generation continues at the right edge, so the padding is on the left
            ids_NT[row, width - len(given[i]) :] = torch.tensor(given[i])
            mask_NT[row, width - len(given[i]) :] = 1
        with _plain_decoding(host.model):
            whole_NT = host.model.generate(
                input_ids=ids_NT.to(host.device),
                attention_mask=mask_NT.to(host.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=host.tokenizer.pad_token_id,
                **how,
            )
        for i, new in zip(group, whole_NT[:, width:].tolist(), strict=True):
            # decoded behind its prompt: alone, SentencePiece would lose the space in front
            out[i] = text_of(given[i] + new)[len(text_of(given[i])) :]
    return out


def _answers(host: Host, read: Sequence[list[int]], max_new_tokens: int, **how: Any) -> list[str]:
    """What is said to texts that are read first: whole answers, or labels."""
    read_NS, seen_NS = pad_right(read, host.tokenizer.pad_token_id).to(host.device), pad_right([[1] * len(r) for r in read]).to(host.device)
    if host.kind == "classifier":
        labels_NV = host.model(input_ids=read_NS, attention_mask=seen_NS).logits.float()
        drawn_N = torch.multinomial(labels_NV.softmax(-1), 1)[:, 0] if how["do_sample"] else labels_NV.argmax(-1)
        return [labels(host)[i] for i in drawn_N.tolist()]
    with _plain_decoding(host.model):
        said_NT = host.model.generate(
            input_ids=read_NS, attention_mask=seen_NS, max_new_tokens=max_new_tokens, pad_token_id=host.tokenizer.pad_token_id, **how
        )
    return [host.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in said_NT[:, 1:].tolist()]


def greedy(host: Host, prompts: Sequence[str], max_new_tokens: int = 12, batch_size: int = 64) -> list[str]:
    """Free greedy continuation of each prompt, without the prompt: an answer, or a label. Raises InvalidExample if a prompt does not fit
    the context."""
    return _generate(host, prompts, max_new_tokens, batch_size, do_sample=False)


def sample(host: Host, prompts: Sequence[str], max_new_tokens: int, seed: int, batch_size: int = 64) -> list[str]:
    """One continuation of each prompt, drawn from the model's own distribution (temperature 1, no truncation)."""
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also reseed the devices that are not put back afterwards
        for generator in (torch.default_generator, *(torch.cuda.default_generators[device.index] for device in devices)):
            generator.manual_seed(seed)
        return _generate(host, prompts, max_new_tokens, batch_size, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


def says(continuation: str, answer: str) -> bool:
    """Whether a continuation gives exactly this answer: it begins with it, and what follows goes on neither with the word nor with the
    name ("Port Louis Island" does not say "Port Louis")."""
    begun = re.match(r"\s*" + r"\s+".join(map(re.escape, answer.split())), continuation)
    if begun is None:
        return False
    rest = continuation[begun.end() :]
    return not rest[:1].isalnum() and not (rest[:1] == " " and rest[1:2].isupper())


def increase(before_N2: Float[Tensor, "N 2"], after_N2: Float[Tensor, "N 2"], z: float = 1.6449) -> tuple[float, float]:
    """Relative increase of the mean token loss, and its one-sided upper bound (95 %, with the default z), from two `score`s of N chunks.

    The mean weighs every token alike, so it is a ratio of sums over chunks; its variance is the linearised one of a ratio estimator
    (Cochran 1977, section 2.11) over the paired differences, so that what the chunks have in common cancels.
    """
    tokens_N = before_N2[:, 1]
    worse_N = before_N2[:, 0] - after_N2[:, 0]
    n, total, loss = len(tokens_N), tokens_N.sum(), -before_N2[:, 0].sum()
    mean = worse_N.sum() / total
    residual_N = worse_N - mean * tokens_N
    error = (n / (n - 1) * residual_N.square().sum()).sqrt() / total
    return float(mean * total / loss), float((mean + z * error) * total / loss)


def furthest(
    read: Callable[[float], tuple[Float[Tensor, "N 2"], bool]],
    known: Mapping[float, Float[Tensor, "N 2"]],
    before_N2: Float[Tensor, "N 2"],
    epsilon: float,
    z: float = 0.0,
    rounds: int = 6,
    further: float = 1.02,
) -> float:
    """The largest share s in [0, 1) of a change that was read and found inside, 0.0 if none was.

    `read(s)` gives the `score` of the N chunks with s of the change on, and whether s is allowed otherwise; it is inside if it is, and if
    the bound of the increase over `before_N2` at `z` is at most epsilon. `known` are the scores of shares that were read before, at least
    s = 1, which is outside. Each chunk's log-probability is taken for the polynomial in s that goes through the base and the nearest
    shares known, up to three of them: the sum over chunks is no simple function of s, but each of them is a smooth one. It ends where the
    next share would be less than `further` times as far.
    """
    points = {s: after_N2 for s, after_N2 in known.items() if after_N2.isfinite().all()}
    uppers = {s: increase(before_N2, after_N2, z)[1] for s, after_N2 in points.items()}
    low, high, barred = 0.0, min((s for s, upper in uppers.items() if upper > epsilon), default=1.0), False
    for _ in range(rounds):
        s = _next_share(points, before_N2, epsilon, z, low, high)
        if barred or not points:  # its costs say nothing of how far it may go
            s = min(s or 1.0, (low + high) / 2 if barred else 0.75 * low + 0.25 * high)
        if s <= further * low:
            break
        after_N2, allowed = read(s)
        upper = increase(before_N2, after_N2, z)[1]
        if after_N2.isfinite().all():
            points[s] = after_N2
        if allowed and upper <= epsilon:
            low = s
        else:
            high, barred = s, barred or upper <= epsilon
    return low


def _next_share(
    points: Mapping[float, Float[Tensor, "N 2"]], before_N2: Float[Tensor, "N 2"], epsilon: float, z: float, low: float, high: float
) -> float:
    """The share between `low` and `high` whose bound should be a little inside; 0.0 if none should be, or if nothing is known."""
    near: list[float] = []
    # both ends of where it must lie, and what is close to the middle
    for p in sorted(points, key=lambda p: 0.0 if p in (low, high) else abs(p - (low + high) / 2)):
        if p in (low, high) or all(abs(p - q) > 0.1 * p for q in near):  # of two that are close the difference is mostly rounding
            near.append(p)
    if len(near) == 1:
        # near the base, a minimum, the increase grows about as s^2; no further than halfway, where the next guess learns most
        upper = increase(before_N2, points[near[0]], z)[1]
        return min(0.5, 0.97 * math.sqrt(epsilon / upper)) * near[0] if upper > 0 else 0.5 * near[0]
    near = near[:3]
    gains = [points[p][:, 0] - before_N2[:, 0] for p in near]

    def upper_at(s: float) -> float:
        gain_N = torch.zeros_like(before_N2[:, 0])
        for p, gain_of_p_N in zip(near, gains, strict=True):
            gain_N += gain_of_p_N * (s / p) * math.prod((s - q) / (p - q) for q in near if q != p)
        return increase(before_N2, torch.stack([before_N2[:, 0] + gain_N, before_N2[:, 1]], dim=1), z)[1]

    # for a narrow ball a change may have to be a thousandth of what it is for a wide one
    shares = torch.linspace(low, high, 100)[1:-1] if low else high * torch.logspace(-4, 0, 200)[:-1]
    return max((s for s in shares.tolist() if near and upper_at(s) <= 0.95 * epsilon), default=0.0)


def fixes(host: Host, examples: Sequence[Example]) -> list[bool]:
    """Whether the host does what each example wants, by what it says.

    raise: the greedy continuation gives the target. lower: it does not. prefer: the target is likelier than the contrast. balance: neither
    is more than 1.5 times as likely as the other (the thresholds of Hewitt et al. 2024, table 1, but free generation where there is one).
    """
    room = max((len(encode(host, e.prompt, e.target)[0]) - len(tokens(host, e.prompt)) for e in examples), default=0) + 4
    said = greedy(host, [e.prompt for e in examples], max_new_tokens=room) if examples else []
    target_N2 = logprobs(host, [(e.prompt, e.target) for e in examples]) if examples else torch.zeros(0, 2)
    contrast_N2 = logprobs(host, [(e.prompt, e.contrast or e.target) for e in examples]) if examples else target_N2
    ahead_N = (target_N2 - contrast_N2)[:, 0]
    verdict = {
        "raise": lambda i, e: says(said[i], e.target),
        "lower": lambda i, e: not says(said[i], e.target),
        "prefer": lambda i, e: bool(ahead_N[i] > 0),
        "balance": lambda i, e: bool(ahead_N[i].abs() <= math.log(1.5)),
    }
    return [verdict[e.goal](i, e) for i, e in enumerate(examples)]


@torch.no_grad()
def promotes(host: Host, token: int, n: int = 8) -> list[list[tuple[int, float]]]:
    """For each sense of a Backpack's token the `n` tokens that it promotes most, and E C(token)_k, what it adds to their logits where its
    weight is 1 (Hewitt et al. 2023, arXiv 2305.16765). Raises UnknownArchitecture, UnknownName."""
    senses_of(host)
    if not 0 <= token < host.model.config.vocab_size:
        raise UnknownName(f"{host.name} has the tokens 0 to {host.model.config.vocab_size - 1}, not {token}.")
    C_KD = host.model.senses(torch.tensor(token, device=host.device))
    E_VD = host.model.get_submodule(host.layout.head).weight
    top = (C_KD @ E_VD.T)[:, : len(host.tokenizer)].float().topk(min(n, len(host.tokenizer)))
    return [list(zip(ids, scores, strict=True)) for ids, scores in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


@torch.no_grad()
def spoken_by(host: Host, shift: Senses, ids_NT: Int[Tensor, "N T"], mask_NS: Int[Tensor, "N S"] | None, cache: Any = None) -> Any:
    """(N, T, D) what `shift` adds to what goes into the head of a Backpack: sum over j <= t and senses l of alpha_l,t,j Delta_(x_j),l.

    None where it adds nothing. One pass of the trunk, over the texts in which a shifted token stands; no sense vector is computed, for the
    Delta alone are weighed (alpha does not depend on them). With a `cache`, (N, T) are the new tokens, and every text is read on, for a
    shifted token may come later.
    """
    V = int(host.model.config.vocab_size)
    shifted_R, row_M = torch.unique(shift.ids, return_inverse=True)
    delta_RKD = torch.zeros(len(shifted_R) + 1, int(host.model.config.num_senses), shift.shift.shape[1])  # the last one: not shifted
    delta_RKD[row_M, shift.senses] = shift.shift
    row_V = torch.full((V,), len(shifted_R)).index_put((shifted_R,), torch.arange(len(shifted_R))).to(host.device)
    # a token that was added to the other model alone is as good as padding
    ids_NT = ids_NT.to(host.device).where(ids_NT < V, host.tokenizer.pad_token_id)
    row_NT = row_V[ids_NT]
    read_N = (row_NT < len(shifted_R)).any(1) if cache is None else torch.ones(len(ids_NT), dtype=torch.bool, device=host.device)
    if not read_N.any():
        return None
    delta_RKD = delta_RKD.to(host.device, host.model.dtype)
    out = host.model.base_model(
        input_ids=ids_NT[read_N],
        attention_mask=None if mask_NS is None else mask_NS.to(host.device)[read_N],
        past_key_values=cache,
        use_cache=cache is not None,
        senses=nn.functional.embedding(row_NT[read_N], delta_RKD.flatten(1)).view(-1, ids_NT.shape[1], *delta_RKD.shape[1:]),
    ).last_hidden_state
    return out.new_zeros(*ids_NT.shape, out.shape[-1]).masked_scatter(read_N[:, None, None], out)
