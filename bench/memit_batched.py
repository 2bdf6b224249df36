"""memit's values for 64 facts side by side, against one fact after the other by passes of the whole model (paired, median of ratios).

One by one is the plain way to find the same values: every step runs all blocks and the head at every token, until the fact is done. Side
by side the part below the edited layer is computed once, the head runs at the scored tokens alone, and each fact leaves when it is done.
Both begin from the same places, so that the values must agree: that is measured too, as is what batching alone gives.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from _bench import arguments, emit
from torch import Tensor

from errata import hooks, hosts, text
from errata.hosts import Host
from errata.lab import tasks
from errata.methods import _values
from errata.methods._descend import goal_losses, kl_sum
from errata.methods.memit import Memit
from errata.types import Run, no_progress

LAYER = 1  # the last of the two that tracing chooses


def alone(host: Host, place: _values.Place, s: _values.Settings) -> Tensor:
    """(D,) the value of one place, written from the formulas at the top of `_values.py`."""
    rows = place.asked
    batch = hosts.pad(host, [(a.ids, a.given) for a in rows])
    at_N, one_N = torch.tensor([a.at for a in rows]), torch.arange(len(rows))
    block = f"{host.layout.blocks}.{LAYER}"
    essence = [i for i, a in enumerate(rows) if a.example is None]
    asked = [i for i, a in enumerate(rows) if a.example is not None and not a.contrast]
    against = [i + (rows[i].example.contrast is not None) for i in asked]
    with torch.no_grad(), hooks.reading(host.model, [block]) as seen:
        base_NTV = hosts.logits(host, batch)
        norm = float(seen[block][0, at_N[0]].norm())
    delta_D = torch.zeros(seen[block].shape[-1])
    m_D, v = torch.zeros_like(delta_D), 0.0
    for step in range(1, s.steps + 1):
        leaf_D = delta_D.clone().requires_grad_()

        def shift(x: Tensor, leaf_D: Tensor = leaf_D) -> Tensor:
            return x.index_put((one_N, at_N), leaf_D, accumulate=True)

        with hooks.shifting(host.model, {block: shift}):
            logits_NTV = hosts.logits(host, batch)
        logp_NT = logits_NTV[:, :-1].log_softmax(-1).gather(-1, batch.ids_NT[:, 1:, None])[..., 0] * batch.scored_NT[:, 1:]
        logp_N, tokens_N = logp_NT.sum(1), batch.scored_NT.sum(1)
        loss_N = goal_losses(logp_N[asked], logp_N[against], tokens_N[asked], [rows[i].example for i in asked], enough=0.0)
        goal = (torch.tensor([rows[i].weight for i in asked]) * loss_N).sum()
        if goal < s.stop:
            break
        loss = goal + s.decay * leaf_D.square().sum() / norm**2
        for i in essence:
            last = rows[i].given - 1
            loss = loss + s.kl * kl_sum(base_NTV[i, last : last + 1], logits_NTV[i, last : last + 1])
        (grad_D,) = torch.autograd.grad(loss, leaf_D)
        b1, b2 = _values.BETAS
        m_D, v = b1 * m_D + (1 - b1) * grad_D, b2 * v + (1 - b2) * float(grad_D.square().sum())
        delta_D = delta_D - s.lr * norm * (m_D / (1 - b1**step)) / (v / (1 - b2**step)) ** 0.5
        delta_D = delta_D * min(1.0, s.clamp * norm / float(delta_D.norm()))
    return delta_D


def timed(work: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Seconds on the wall, seconds of the processor, and what came out."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = work()
    return time.perf_counter() - wall, time.process_time() - cpu, out


def main() -> None:
    args = arguments(__doc__)
    host = hosts.load("lab/neox", device="cpu")
    facts = tasks.choose("test", 16 if args.quick else 64, "mixed", seed=args.seed)
    examples = [replace(tasks.example(fact), subject=fact.subject) for fact in facts]
    method = Memit()
    run = Run(hold=text.standing(host)[0], seed=args.seed)
    leads = _values.prefixes(_values.quiet(host, examples, run, method.contexts), method.contexts)
    found = _values.places(host, examples, leads)
    settings = _values.Settings(**{f.name: method.config[f.name] for f in fields(_values.Settings)})
    ways: dict[str, Callable[[], Tensor]] = {
        "side by side": lambda: _values.values(host, found, LAYER, settings, no_progress),
        "plain": lambda: torch.stack([alone(host, place, settings) for place in found]),
        "alone": lambda: torch.cat([_values.values(host, [place], LAYER, settings, no_progress) for place in found]),
    }
    taken = [{name: timed(work) for name, work in ways.items()} for _ in range(1 if args.quick else 3)]

    def ratio(way: str, clock: int) -> float:
        return statistics.median(t[way][clock] / t["side by side"][clock] for t in taken)

    fast = taken[0]["side by side"]
    how = (
        f"{len(found)} facts with subjects, layer {LAYER}, {len(leads)} prefixes, {len(taken)} rounds, {torch.get_num_threads()} thread(s)"
    )
    emit(args, "memit values: one by one / side by side", ratio("plain", 0), (">=", 2.5), f"{how}; side by side {fast[0]:.1f} s")
    emit(args, "memit values: one by one / side by side, processor", ratio("plain", 1), None, "the same in seconds of the processor")
    emit(args, "memit values: batching alone", ratio("alone", 0), None, "the same cut passes, but one fact at a time")
    for way in ("plain", "alone"):
        worst = max(float((t[way][2] - t["side by side"][2]).abs().max()) for t in taken)
        length = float(fast[2].norm(dim=1).median())
        emit(
            args, f"memit values: greatest difference ({way})", worst, ("<=", 1e-4), f"of any number; median length of a value {length:.2f}"
        )


if __name__ == "__main__":
    main()
