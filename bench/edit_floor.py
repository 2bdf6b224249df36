"""What an edit of n facts costs beside the floor: one lean pass forwards and backwards over the same tokens.

    edit     `rows` and `solve`: value gradients, the network's differences, the sums, their solution, the patch. No budget is looked at
             (`held` = 0), and no gate; of `malmen` one round
    floor    the same texts in the same batches: no gradient of a weight, the graph cut below the first edited module, the head at what
             predicts the answers alone. (The last MLP is asked everywhere, which an edit of these methods does not do)

Both on one thread, in pairs, so that their ratio does not depend on what else runs; the median of the ratios counts. What `malmen` and
`mend` have learnt does not matter for that: they learn for one step. The floor of `malmen` is over its other phrasings too, which it
reads, and printed beside it is the ratio to the floor of the examples' own tokens.

By default `malmen` takes more rounds, each with another pass over all that it reads, and looks at what text loses in each: what that
comes to, against the same floor, is told for few facts, and has no goal.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from _bench import arguments, emit

from errata import hooks, hosts, methods, text
from errata.hosts import Host
from errata.lab import tasks
from errata.methods import malmen
from errata.types import Example, Method, Run, Summed

GOALS = {16: 2.0, 128: 1.25, 1024: 1.25}
MANY = 128  # facts of which a whole edit is timed, at most
PASS = 512  # tokens at once where gradients are taken, as in the methods


def floor(host: Host, examples: Sequence[Example], modules: Sequence[str]) -> None:
    """A pass forwards and back to the outputs of `modules`, for -log p of the answers."""
    encoded = [hosts.encode(host, e.prompt, e.target) for e in examples]
    still = {name: w.detach() for name, w in host.model.named_parameters()}
    for group in hosts.by_length(encoded, PASS):
        outputs: list[torch.Tensor] = []

        def cut(y: torch.Tensor, outputs: list[torch.Tensor] = outputs) -> torch.Tensor:
            outputs.append(y if y.requires_grad else y.detach().requires_grad_())
            return outputs[-1]

        with torch.enable_grad(), hooks.shifting(host.model, dict.fromkeys(modules, cut)):
            loss = -hosts.scored_logprobs(host, hosts.pad(host, [encoded[i] for i in group]), still).sum()
            torch.autograd.grad(loss, outputs)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    host = hosts.load("lab/neox", device="cpu")
    hold, _ = text.standing(host)
    learning = tasks.cases("train", 64, seed=args.seed)
    rounds = 3 if args.quick else 7
    short = {"steps": 1, "least": 4, "most": 4}
    for name, settings in (("malmen", short | {"held": 0, "rounds": 1}), ("mend", short), ("ultraedit", {"held": 0})):
        made: Method = methods.make(name, **settings)
        assert isinstance(made, Summed)
        run = Run(hold=hold[:400], state=made.prepare(host, learning, Run(hold=hold[:400])))
        assert run.state is not None
        modules = run.state.config["modules"]
        for n in (16, 128) if args.quick else GOALS:
            examples = tuple(c.example for c in tasks.cases("test", n, seed=args.seed))
            ways = run.state.config.get("ways", {})
            read = [x for e in examples for x in (e, *malmen.restatements(e, ways, len(ways) and made.config["restated"]))]
            pairs = []
            for _ in range(rounds):
                whole = seconds(lambda: made.edit(host, examples, run))  # noqa: B023
                pairs.append((whole, seconds(lambda: floor(host, read, modules)), seconds(lambda: floor(host, examples, modules))))  # noqa: B023
            ratio, own = (statistics.median(p[0] / p[i] for p in pairs) for i in (1, 2))
            each = statistics.median(p[0] for p in pairs) / n
            goal = ("<=", GOALS[n])
            how = f"{each:.4f} s of processor time a fact; {len(read)} texts of {n} facts; {own:.2f} times the floor of the examples alone"
            about = "no budget" if name != "malmen" else "one round, no budget"
            emit(args, f"an edit of {n} facts / its floor ({name})", ratio, goal, f"{about}; {how}; median of {rounds} pairs, one thread")
            if name == "malmen" and n <= MANY:
                usual = methods.make(name, **short)
                whole = seconds(lambda: usual.edit(host, examples, replace(run, hold=hold)))  # noqa: B023
                how = f"{usual.config['rounds']} rounds within the budget; documents drawn from {len(hold)}; {whole / n:.3f} s a fact, once"
                emit(args, f"the same by default ({name}, {n} facts)", whole / statistics.median(p[1] for p in pairs), None, how)


if __name__ == "__main__":
    main()
