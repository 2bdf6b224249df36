"""Runs every script here and refreshes the measured table in docs/numbers.md: `make bench`."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NUMBERS = HERE.parent / "docs" / "numbers.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> int:
    rows, failed = [], []
    for script in sorted(HERE.glob("[!_]*.py")):
        if script.name == "run.py":
            continue
        print(f"{script.name} ...", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(script), "--json", *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(script.name)
        for line in done.stdout.splitlines():
            row = json.loads(line)
            print(line, flush=True)
            shown = "none" if row["value"] is None else f"{row['value']:.4g}"
            holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            rows.append(f"| {script.stem} | {row['name']} | {shown} | {row['goal'] or ''} | {holds} | {row['how']} |")
    head = [
        BEGIN,
        f"Taken {datetime.date.today()} on {os.cpu_count()} cores ({platform.machine()}), options: `{' '.join(sys.argv[1:]) or 'none'}`.",
        "",
        "| script | number | value | goal | holds | how |",
        "|---|---|---|---|---|---|",
    ]
    text = NUMBERS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    NUMBERS.write_text(before + "\n".join([*head, *rows, END]) + after)
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
