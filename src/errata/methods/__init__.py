"""The register: name -> where the method's class stands. One line for each; CLI, docs table, server and tests read it."""

import importlib
from typing import Any

from errata.types import InvalidExample, Method, UnknownName

METHODS: dict[str, str] = {
    "alphaedit": "errata.methods.alphaedit:Alphaedit",
    "elder": "errata.methods.elder:Elder",
    "emmet": "errata.methods.emmet:Emmet",
    "ensemble": "errata.methods.ensemble:Ensemble",
    "enn": "errata.methods.enn:Enn",
    "eren": "errata.methods.eren:Eren",
    "finetune": "errata.methods.finetune:Finetune",
    "grace": "errata.methods.grace:Grace",
    "ke": "errata.methods.ke:Ke",
    "lora": "errata.methods.lora:Lora",
    "lu": "errata.methods.lu:Lu",
    "malmen": "errata.methods.malmen:Malmen",
    "melo": "errata.methods.melo:Melo",
    "memit": "errata.methods.memit:Memit",
    "mend": "errata.methods.mend:Mend",
    "nse": "errata.methods.nse:Nse",
    "one_layer_interpolation": "errata.methods.one_layer:OneLayerInterpolation",
    "rome": "errata.methods.rome:Rome",
    "rp": "errata.methods.rp:Rp",
    "senses": "errata.methods.senses:Senses",
    "serac": "errata.methods.serac:Serac",
    "ultraedit": "errata.methods.ultraedit:Ultraedit",
}
AT_LEAST_ONE = ("asked", "batch_size", "chunk", "every", "least", "nearest", "notes", "patience", "rounds", "texts")


def method_class(name: str) -> type[Method]:
    """The class registered as `name`. Raises UnknownName with the nearest name."""
    if name not in METHODS:
        raise UnknownName.among("method", name, METHODS)
    room, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(room), cls)  # type: ignore[no-any-return]


def make(name: str, **config: Any) -> Method:
    """The method with hyper-parameters. Raises UnknownName for the method or for a hyper-parameter that it does not have, InvalidExample
    for one that cannot be: none is negative."""
    cls = method_class(name)
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    for key in config:
        if key not in known:
            raise UnknownName.among(f"setting of {name}", key, known)
    for key, value in config.items():
        least = 1 if key in AT_LEAST_ONE else 0
        if isinstance(value, int | float) and not value >= least:
            raise InvalidExample(f"The setting '{key}' of {name} is {least} or more, got {value}.")
    try:
        return cls(**config)
    except TypeError as e:
        raise InvalidExample(f"Cannot make {name} with {config}: {e}.") from e
