"""What every script here shares: its options, and how a measured number is printed.

With --json a script prints one object a line: name, value, goal, holds, how. `holds` is computed from the measurement, never set; it is
null where a number has no goal.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def arguments(about: str | None) -> argparse.Namespace:
    """The options of the contract: --json, --data, --seed, --quick; and --only."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--data", type=Path, help="folder of real data, where the script reads any")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="under a minute: smaller, the same work")
    parser.add_argument("--only", help="comma-separated names, where a script compares several: these alone")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


Goal = tuple[str, float]  # (">=", 0.8)
_HOLDS: dict[str, Callable[[float, float], bool]] = {">=": lambda v, g: v >= g, "<=": lambda v, g: v <= g}


def emit(args: argparse.Namespace, name: str, value: float | None, goal: Goal | None, how: str) -> None:
    """Print one measured number. A value of None (0 of 0) never holds."""
    holds = None if goal is None else value is not None and _HOLDS[goal[0]](value, goal[1])
    text = None if goal is None else f"{goal[0]} {goal[1]:g}"
    if args.json:
        print(json.dumps({"name": name, "value": value, "goal": text, "holds": holds, "how": how}), flush=True)
    else:
        mark = "" if holds is None else ("holds" if holds else "MISSED")
        shown = "none" if value is None else f"{value:.4g}"
        print(f"{name:58} {shown:>10}  {text or '':>10}  {mark:6}  {how}", flush=True)
    sys.stdout.flush()
