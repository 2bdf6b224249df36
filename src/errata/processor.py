"""A patch of `ensemble` as a logits processor, for a `generate` of one's own: nothing is put on the model.

    host.model.generate(**inputs, logits_processor=[errata.logits_processor(host, patch)])

With the patch on (`apply.py`) the same comes out, and faster: there the small model has a cache; here it reads the whole text for every
token. Nothing here changes a host.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from errata import apply, hosts
from errata.hosts import Host
from errata.types import Ensemble, InvalidPatch, Patch


@final
class Processor(LogitsProcessor):  # type: ignore[misc]
    """Takes and gives (N, V) scores of the next token of (N, T) tokens. Padding on the left is told by the pad token of the host."""

    def __init__(self, host: Host, op: Ensemble) -> None:
        self.op, self.small, self.padding = op, hosts.beside(host, op.small), host.tokenizer.pad_token_id
        self.common = min(len(host.tokenizer), len(self.small.tokenizer))
        self.E_VD = self.small.model.get_submodule(self.small.layout.head).weight.detach()[: self.common]

    def __call__(self, input_ids: Int[Tensor, "N T"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        mask_NT = (input_ids != self.padding).long().cummax(dim=1).values
        mask_NT[:, -1] = 1
        added_NTD = hosts.spoken_by(self.small, self.op.shift, input_ids, mask_NT)
        if added_NTD is not None:
            more_NV = (self.op.scale * (added_NTD[:, -1] @ self.E_VD.T)).to(scores.device)
            scores = torch.cat([scores[:, : self.common] + more_NV, scores[:, self.common :]], dim=1)
        return scores.log_softmax(-1)  # beams are compared by it


def logits_processor(host: Host, patch: Patch) -> Processor:
    """What `patch` adds to the host's logits. Raises InvalidPatch if it is not one of `ensemble`, and what `apply.put_on` raises."""
    apply.check(host, patch)
    match patch.ops:
        case (Ensemble() as op,):
            return Processor(host, op)
    raise InvalidPatch(f"Patch {patch.id} ({patch.method}) changes weights; only one of ensemble is a logits processor. Put it on instead.")
