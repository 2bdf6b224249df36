"""1,000 records of the edit memory -> the weights of the lab's NeoX, and a compaction that is killed at 50 random moments.

Quality: facts of the test split are put into a memory and compacted by one method inside the budget; each is then asked for in its own
words by free generation. How many leave the memory with their answer intact is the number; what stays is answered by the memory.

Kills: a child process commits and undoes the same compaction over and over, and is killed with SIGKILL at a random moment. After each kill
the ledger is opened again: every record must be answered exactly once, by the memory or by the current patch, and the ledger be sound.
With --quick 20 records, a quick descent, and five kills. --only names a
method that needs no preparation, and another model before it: `t5/lora`.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _bench import arguments, emit

from errata import artefact, compact, hosts, methods
from errata.hosts import Host
from errata.lab import corpus, tasks
from errata.ledger import Ledger
from errata.memory.records import Records
from errata.types import Budget, Record

EPSILON = 1e-2
CHILD = "ERRATA_COMPACTION_CHILD"


def filled(path: Path, host: Host, n: int, seed: int) -> Ledger:
    ledger = Ledger.create(path, host.id, host.name, Budget(epsilon=EPSILON))
    cases = tasks.cases("test", n, seed=seed, form=corpus.FORMS[host.kind])
    Records(ledger).add(*(Record(example=c.example) for c in cases), clash="supersede")
    return ledger


def child(path: Path) -> None:
    """Commit and undo, until somebody kills it."""
    with Ledger(path) as ledger:
        patch = artefact.load_patch(path / "patch.safetensors")
        verdict = ledger.verdict(patch.id)
        records = Records(ledger)
        while True:
            rows = [row for row in records.listed() if row.active]
            compact._commit(ledger, patch, verdict, rows, [row.record for row in rows], ledger.active())
            compact.undo(ledger)


def killed(path: Path, moments: int, seed: int) -> tuple[int, int]:
    """(records lost, records doubled) over all kills."""
    rng, lost, doubled = random.Random(seed), 0, 0
    with Ledger(path) as ledger:
        wanted = {r.example.id for r in Records(ledger).active()}
    for _ in range(moments):
        process = subprocess.Popen([sys.executable, __file__], env=os.environ | {CHILD: str(path)})
        time.sleep(rng.uniform(3.0, 6.0))  # a second or two go by until it begins
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Ledger(path) as ledger:
            memory = {r.example.id for r in Records(ledger).active()}
            active = {e.id for e in ledger.active()}
            answered = {e.id for e in ledger.patch().examples} if active else set()
            lost += len(wanted - memory - answered) + sum(not p.harmless for p in ledger.verify())
            doubled += len(memory & answered)
            if active:  # it was killed between the two: begin again from where all are in the memory
                compact.undo(ledger)
    return lost, doubled


def main() -> None:
    if path := os.environ.get(CHILD):
        child(Path(path))
    args = arguments(__doc__)
    n, moments = (20, 5) if args.quick else (1000, 50)
    model, _, method = (args.only or "finetune").rpartition("/")
    settings: dict[str, int] = {}
    if method == "finetune":  # records are asked in their own words: few others, no text before them, and more steps instead
        settings = {"steps": 12} if args.quick else {"steps": 230, "contexts": 0, "restated": 8}
    host = hosts.load(f"lab/{model or 'neox'}", device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        with filled(Path(scratch) / "quality", host, n, args.seed) as ledger:
            start = time.process_time()
            done = compact.compact(ledger, host, methods.make(method, **settings), seed=args.seed)
            minutes = (time.process_time() - start) / 60
        share = len(done.moved) / n
        v = done.verdict
        how = f"{method}; loss {v.increase:+.1e} (95 % < {v.upper:+.1e}), scaled to {v.scale:.2g}; {minutes:.1f} minutes of processor time"
        emit(args, f"of {n} records leave the memory, answered by the weights", share, None if args.quick else (">=", 0.95), how)
        with filled(Path(scratch) / "kills", host, min(n, 200), args.seed) as ledger:
            made = compact.compact(ledger, host, methods.make("lu"), seed=args.seed)
            artefact.save(made.patch, ledger.path / "patch.safetensors")
            compact.undo(ledger)
        lost, doubled = killed(Path(scratch) / "kills", moments, args.seed)
        emit(args, f"records lost in {moments} kills", lost, ("<=", 0), f"{min(n, 200)} records, compacted and brought back, SIGKILL")
        emit(args, f"records answered twice in {moments} kills", doubled, ("<=", 0), "in the memory and in the current patch")


if __name__ == "__main__":
    main()
