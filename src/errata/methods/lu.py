"""lu: a lookup cache, where what a text becomes in the model is near to what an example's prompt became, the stored target is said.

    h(x) = mean over tokens of the last hidden states of x;   where min_i ||h(x) - h(x_i)|| < bound:  y_i, and the model itself elsewhere

LU of Mitchell et al. 2022 (SERAC), arXiv 2206.06520, section 4.1. Nothing is trained. What counts as near depends on the model, so by
default the bound is found: half of the least distance from an example's prompt to what is asked in the text that holds still, so that
nothing of that is answered by an example.

Unlike serac@c963a39 the mean is over the tokens and not over the padding; a causal model says the tokens of the target one after the
other, as long as what was said agrees with them, and goes on itself behind them.

File legend: N examples, D width.
"""

from dataclasses import dataclass
from typing import final

from errata.hosts import Host
from errata.methods._memory import keys, memory, requests
from errata.types import Example, Method, Patch, Run


@final
@dataclass(frozen=True, kw_only=True)
class Lu(Method):
    """bound: greatest distance, in the units of the hidden states; 0: found from the text that holds still."""

    bound: float = 0.0

    def trained(self, host: Host) -> int:
        """How many numbers an edit moves: none, for it is looked up."""
        return 0

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        requests("lu", host, examples)
        keys_ND, bound = keys(host, examples, run)
        how = {"gate": "distance", "voice": "stored", "bound": self.bound or bound, "nearest": 1}
        return memory(host, "lu", self.config, examples, keys_ND, **how)
