"""Errata fixes what a language model gets wrong: one canonical example in; a verified, reversible fix out.

    host = errata.load("lab/neox")
    patch, verdict = errata.edit(host, ["The capital of Mauritius is| Port Louis"], "lora", epsilon=1e-3)
    with errata.applied(host, patch):
        print(errata.greedy(host, ["The government of Mauritius sits in"]))

Names are imported when they are first used, so that `import errata` and `errata --help` stay fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "Budget": "types",
    "Case": "types",
    "EditError": "types",
    "EditMemory": "memory.store",
    "Example": "types",
    "Host": "hosts",
    "Ledger": "ledger",
    "Patch": "types",
    "Record": "types",
    "Verdict": "types",
    "applied": "apply",
    "attached": "memory.live",
    "edit": "build",
    "greedy": "hosts",
    "host_of": "hosts",
    "load": "hosts",
    "load_patch": "artefact",
    "logits_processor": "processor",
    "on_ray": "engine",
    "put_on": "apply",
    "save": "artefact",
    "take_off": "apply",
}

__all__ = sorted([*_ROOMS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'errata' has no attribute '{name}'")
    return getattr(importlib.import_module(f"errata.{_ROOMS[name]}"), name)
