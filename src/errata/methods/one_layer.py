"""one_layer_interpolation (1-LI): finetune one layer, and stop between it and the base.

    theta_alpha = theta_0 + alpha (theta_1 - theta_0)   on that layer, the rest as it was          arXiv 2303.00046

theta_1 comes from the same descent inside the ball as `finetune`. alpha may be over 1. Any additive patch can be drawn along the same line
(`apply.scaled`); `errata eval alpha` shows what becomes of it there.
"""

from dataclasses import dataclass, fields
from typing import final

from errata.hosts import Host
from errata.methods.finetune import Finetune
from errata.types import Add, Example, InvalidExample, Method, Patch, Run


@final
@dataclass(frozen=True, kw_only=True)
class OneLayerInterpolation(Method):
    """`layer`: which one is finetuned, counted from 0; the middle one without. `alpha`: how far to go. The rest as in `finetune`."""

    layer: int | None = None
    alpha: float = 1.0
    steps: int = 144
    lr: float = 0.014
    lam: float = 200.0
    contexts: int = 1
    restated: int = 48
    neighbours: int = 8
    hold: int = 96
    searched: int = 4000
    damping: float | None = 0.1
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise InvalidExample(f"one_layer_interpolation needs an alpha over 0, got {self.alpha}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        layer = host.blocks // 2 if self.layer is None else self.layer
        if not 0 <= layer < host.blocks:
            raise InvalidExample(f"{host.name} has layers 0 to {host.blocks - 1}, not {layer}.")
        shared = {f.name: getattr(self, f.name) for f in fields(Finetune) if hasattr(self, f.name)}
        one = Finetune(modules=f"{host.layout.blocks}.{layer}.", **shared).edit(host, examples, run)
        ops = tuple(Add(weight=op.weight, delta=self.alpha * op.delta) for op in one.ops if isinstance(op, Add))
        return Patch(method="one_layer_interpolation", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)
