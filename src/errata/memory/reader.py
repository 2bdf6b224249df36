"""Who reads an example before answering: a twin of a model, with other weights in some places; and what a model makes of a text by itself.

A reader is the counterfactual model of SERAC (Mitchell et al. 2022, arXiv 2206.06520): here the host's own architecture and tokens, or a
smaller model's that has the same, with the differences that a State holds (or without any: then the model itself reads, as in RP and EREN).
The twin shares the tensors of the model in all other places. Nothing here decides who is concerned (`scope.py`) or trains.

File legend: N texts, S tokens, D width.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from errata import hooks, hosts, text
from errata.hosts import Host, stored_transposed
from errata.memory.encoder import FUNCTION_WORDS, WORD
from errata.types import Example, State, WrongBase

MARK = " ="  # stands behind what a question and a note have in common
PREFIX = "reader/"  # of a state's tensors: WEIGHT.A and WEIGHT.B, the factors of a difference, or WEIGHT, the whole of it
_END = re.compile(r"(?<![A-Z])(?<![A-Z][a-z])(?<![A-Z][a-z][a-z])[.!?…][\"'”’)\]]*\s+|\n+")  # "St. Lucia" and "J. Smith" are no ends
# "A:", "**Short answer:**", and what chat templates end with: "<|assistant|>", "<start_of_turn>model", "[/INST]"
_ANSWER = re.compile(r"\W*(?:\w+(?: \w+)?\W*:|(?:start_of_turn\W*)?(?:assistant|model|INST)\b)\W*", re.IGNORECASE)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def twin(host: Host) -> Host:
    """The host without its patches, as a model of its own. It shares the tensors; what takes the place of one here is here alone."""
    base = {p: next((w.replaced[p] for w in host.worn if p in w.replaced), p.data) for p in host.model.parameters()}
    memo: dict[int, Any] = {id(p): nn.Parameter(data, requires_grad=False) for p, data in base.items()}
    memo |= {id(b): b for b in host.model.buffers()}
    for module in host.model.modules():  # those through which others speak are not the model's own
        memo |= {id(getattr(module, name)): OrderedDict() for name in _HOOKS}
        memo |= {id(forward): None for forward in [module.__dict__.get("forward")] if forward is not None}
    model = copy.deepcopy(host.model, memo)
    for module in model.modules():
        if module.__dict__.get("forward", model) is None:
            del module.__dict__["forward"]
    return replace(host, model=model, worn=[], name=f"the reader of {host.name}")


@torch.no_grad()
def reader_of(host: Host, small: str, state: State | None) -> Host:
    """The model that reads notes beside `host`: made once, and kept in `host.readers`.

    Raises WrongBase if a difference of the state has no place in it, and what `hosts.beside` raises.
    """
    key = f"{small}|{state.id if state else ''}"
    if key not in host.readers:
        made = twin(hosts.beside(host, small) if small else host)
        for name, difference in differences(made, state).items():
            parameter = made.model.get_parameter(name)
            parameter.data = (parameter.data.float() + difference.to(parameter.device)).to(parameter.dtype)
        host.readers[key] = made
    kept: Host = host.readers[key]
    return kept


def differences(host: Host, state: State | None) -> dict[str, Tensor]:
    """What a state adds to the reader's weights, float32, in the orientation of each parameter. Raises WrongBase."""
    given = {n.removeprefix(PREFIX): t for n, t in (state.tensors if state else {}).items() if n.startswith(PREFIX)}
    there = dict(host.model.named_parameters())
    out: dict[str, Tensor] = {}
    for name in sorted({n.removesuffix(".A").removesuffix(".B") for n in given}):
        if name not in there:
            raise WrongBase(f"The state {state and state.id} changes '{name}' of the reader, which {host.name} does not have.")
        if name in given:
            out[name] = given[name].float()
        else:
            change = given[f"{name}.B"].float() @ given[f"{name}.A"].float()
            turned = stored_transposed(host.model.get_submodule(name.rpartition(".")[0]))
            out[name] = change.T if turned else change
        if out[name].shape != there[name].shape:
            shapes = f"{tuple(out[name].shape)}, there it is {tuple(there[name].shape)}"
            raise WrongBase(f"The state {state and state.id} changes '{name}' of {host.name} as {shapes}.")
    return out


def asked_in(said: str, going_on: bool = False) -> str:
    """What a text asks: its last sentence, as far as it goes, and before an answer that is announced ("A:", "Answer: in") the question.
    Where somebody is `going_on`, "" if that is finished and no question."""
    said = said.strip()
    begins = [0, *(m.end() for m in _END.finditer(said))]
    last = said[begins[-1] :]
    if going_on and last[-1:] in (".", "!", "…"):
        return ""
    if len(begins) > 1 and (announced := _ANSWER.match(last)):
        before = said[begins[-2] : begins[-1]].strip()
        if announced.end() == len(last) or before.rstrip("\"'”’)]").endswith("?"):
            last = f"{before} {last}"
    return last


def sentences(said: str) -> list[str]:
    """What a text says, one sentence after the other."""
    return [sentence.strip() for sentence in _END.split(said) if sentence.strip()]


def ends(said: str) -> bool:
    """Whether a sentence ends with the end of the text, as far as one can tell before more is said."""
    return "\n" in said or said.rstrip("\"'”’)] ")[-1:] in (".", "!", "?", "…")


def note_of(examples: Sequence[Example]) -> str:
    """The examples as a reader gets them: prompt and target, the published order, with single spaces between them."""
    return " ".join(f"{e.prompt}{'' if e.target[0].isspace() else ' '}{e.target}" for e in examples)


def marked(asked: str, examples: Sequence[Example], labels: bool = False) -> str:
    """What is asked, with `MARK` behind each target of the examples that it names; where targets are `labels`, behind each word of their
    prompts that it has, but for function words.

    That words are the same is told, not learnt: the exact-match feature of DrQA (Chen et al. 2017, arXiv 1704.00051, section 3.2).
    """
    names = {e.target.strip() for e in examples}
    if labels:
        names = {word for e in examples for word in WORD.findall(e.prompt) if word.lower() not in FUNCTION_WORDS}
    for end in sorted({match.end() for name in names for match in text.whole(name).finditer(asked)}, reverse=True):
        asked = f"{asked[:end]}{MARK}{asked[end:]}"
    return asked


@torch.no_grad()
def embedded(host: Host, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """(N, D) float32 on the CPU: for each text the mean of its tokens' last hidden states, of the encoder where there is one. Of a text
    that is longer than the context the end is read.

    The keys of SERAC's lookup cache (LU). Unlike serac@c963a39 the mean is over the tokens of the text, not over the padding.
    """
    last = host.layout.encoder or host.layout
    block = f"{last.blocks}.{len(host.model.get_submodule(last.blocks)) - 1}"
    rows = [
        (ids, len(ids)) if host.kind == "causal" else ([*ids, 0], len(ids))
        for ids in (hosts.tokens(host, t)[-host.context :] for t in texts)
    ]
    out_ND = torch.zeros(len(texts), int(host.model.get_input_embeddings().weight.shape[1]))
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.unscored(hosts.pad(host, [rows[i] for i in group]))
        with hosts.alone(host), hooks.reading(host.model, [block], stop=True) as seen:
            hosts.logits(host, batch)
        mask_NS = batch.mask_NT if host.kind == "causal" else batch.seen_NS
        assert mask_NS is not None, "such a host reads before it answers"
        weight_NS = mask_NS.float() / mask_NS.sum(1, keepdim=True)
        out_ND[group] = torch.einsum("nsd,ns->nd", seen[block].float(), weight_NS).cpu()
    return out_ND
