"""Runs the scripts here and refreshes their rows of the measured table in docs/numbers.md: `make bench`.

Names before the options choose scripts, as in `make bench BENCH="one_edit apply_undo --quick"`; the rows of the others stay.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

HERE = Path(__file__).parent
NUMBERS = HERE.parent / "docs" / "numbers.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEAD = ["| script | number | value | goal | holds | how |", "|---|---|---|---|---|---|"]


def main() -> int:
    scripts = {script.stem: script for script in sorted(HERE.glob("[!_]*.py")) if script.name != "run.py"}
    named = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(named) :]
    if unknown := [name for name in named if name not in scripts]:
        print(f"There is no {unknown[0]} here, only {', '.join(scripts)}.", file=sys.stderr)
        return 2
    before, _, rest = NUMBERS.read_text().partition(BEGIN)
    measured, _, after = rest.partition(END)
    rows = {name: [line for line in measured.splitlines() if line.startswith(f"| {name} |")] for name in scripts}
    failed = []
    for name in named or scripts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(scripts[name]), "--json", *options], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
        # where the data lies is nobody else's business
        shown = ["DIR" if last == "--data" else word for last, word in zip(["", *options], options, strict=False)]
        taken = f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}){', ' + ' '.join(shown) if shown else ''}"
        rows[name] = []
        for line in done.stdout.splitlines():
            row = json.loads(line)
            print(line, flush=True)
            value = "none" if row["value"] is None else f"{row['value']:.4g}"
            holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            rows[name].append(f"| {name} | {row['name']} | {value} | {row['goal'] or ''} | {holds} | {row['how']}; {taken} |")
        table = [BEGIN, *HEAD, *(line for name in scripts for line in rows[name]), END]
        NUMBERS.write_text(before + "\n".join(table) + after)  # each time: the next script may take an hour
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
