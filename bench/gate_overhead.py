"""What a memory costs where it has nothing to say: a closed gate over the plain base, on the lab's models, 1,000 records.

The first batch of rows of 128 tokens of reference text for which the gate stays closed goes through the model as anybody would call it,
`model(input_ids)`, without and with the memory on, in turn. What is measured is the whole of the gate: the texts of the rows, the search,
and the verifier where the search finds something near. The encoder is excluded, as it depends on what is taken for one, and reported apart.
What the gate ruled before is forgotten between passes. With --quick 100 records and few pairs.
"""

import itertools
import time
from dataclasses import replace
from statistics import median

import torch
from _bench import arguments, emit

from errata import apply, hosts, methods, text
from errata.hosts import Host
from errata.lab import corpus, tasks
from errata.memory.encoder import Vectors
from errata.memory.route import Router
from errata.types import Run

GOAL = 0.10
WIDTH, ROWS = 128, 8


class Known:
    """The encoder, with the vectors at hand: what it takes is counted apart."""

    def __init__(self, router: Router) -> None:
        assert router.encoder is not None, "a trained scope has one"
        self.encoder, self.seen, self.seconds = router.encoder, dict[str, Vectors](), 0.0
        self.width, self.id, self.name, self.window = router.encoder.width, router.encoder.id, router.encoder.name, router.encoder.window

    def encode(self, texts: list[str]) -> Vectors:
        import numpy as np

        if missing := [t for t in dict.fromkeys(texts) if t not in self.seen]:
            start = time.process_time()
            self.seen |= dict(zip(missing, self.encoder.encode(missing), strict=True))
            self.seconds += time.process_time() - start
        return np.stack([self.seen[t] for t in texts])


def rows_of(host: Host, documents: tuple[str, ...], batch: int) -> dict[str, torch.Tensor]:
    """One batch without padding: documents one after the other, cut into rows."""
    asked = documents if host.kind == "causal" else [d.rpartition("|")[0] for d in documents]
    ids = [i for d in asked for i in hosts.tokens(host, d)][batch * ROWS * WIDTH : (batch + 1) * ROWS * WIDTH]
    given = {"input_ids": torch.tensor(ids).view(ROWS, WIDTH)}
    return given | ({"decoder_input_ids": torch.zeros(ROWS, 8, dtype=torch.long)} if host.kind == "seq2seq" else {})


def main() -> None:
    args = arguments(__doc__)
    n, pairs = (100, 3) if args.quick else (1000, 15)
    for name in args.only.split(",") if args.only else ("lab/neox",) if args.quick else ("lab/neox", "lab/t5", "lab/bert"):
        host = hosts.load(name, device="cpu")
        form = corpus.FORMS[host.kind]
        hold, judging = text.standing(host)
        made = methods.make("rp", verifier="distance")
        state = made.prepare(host, tasks.cases("train", 400, seed=args.seed, form=form), Run(hold=hold, seed=args.seed))
        examples = tuple(c.example for c in tasks.cases("test", n, seed=args.seed, form=form))
        patch = made.edit(host, examples, Run(state=state))
        kept, _ = text.set_aside(judging[:2000], examples, text.answers_of(host, examples))
        plain: list[float] = []
        gated: list[float] = []
        with torch.no_grad(), apply.applied(host, patch):
            (router,) = host.speakers
            assert isinstance(router, Router)
            known = Known(router)
            assert router.scope is not None
            router.encoder, router.scope = known, replace(router.scope, encoder=known)
            for skipped in itertools.count():
                given = rows_of(host, kept, skipped)
                host.model(**given)
                if not any(turn.examples for turn in router.rules.values()):
                    break
                router.rules.clear()
                router.last.clear()
            for pair in range(pairs + 1):
                for silent, times in ((True, plain), (False, gated)):
                    router.silent = silent
                    router.rules.clear()
                    router.last.clear()
                    start = time.process_time()
                    host.model(**given)
                    times.append(time.process_time() - start)
                if pair == 0:  # the first pass finds the vectors, and memory
                    plain.clear()
                    gated.clear()
        share = median(b / a for a, b in zip(plain, gated, strict=True)) - 1
        goal = ("<=", GOAL) if not args.quick else None
        how = f"{ROWS} x {WIDTH} tokens, median of {pairs} pairs in processor time, a pass {median(plain) * 1e3:.0f} ms; "
        how += f"batches skipped for a row that fired: {skipped}"
        emit(args, f"{name}: a closed gate of {n} records over the plain base", share, goal, how)
        emit(
            args, f"{name}: its encoder over the plain base", known.seconds / len(known.seen) * ROWS / median(plain), None, f"{known.name}"
        )


if __name__ == "__main__":
    main()
