"""Work for workers, some of it deadly; a module of its own, for they import it too."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Spread = Callable[..., Any]


def deadly(spread: Spread, marker: Path, shard: int) -> Spread:
    """The spread with a worker that is killed while it does the `shard`: the first time only, in which it makes the file `marker`."""

    def killing(host: Any, begin: Callable[..., Any], shards: Sequence[Any], shared: Any) -> Any:
        return spread(host, begun, list(enumerate(shards)), (str(marker), shard, begin, shared))

    return killing


def begun(host: Any, shared: tuple[str, int, Callable[..., Any], Any]) -> Callable[[tuple[int, Any]], Any]:
    marker, shard, begin, own = shared
    do = begin(host, own)

    def work(numbered: tuple[int, Any]) -> Any:
        if numbered[0] == shard and not os.path.exists(marker):
            open(marker, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return do(numbered[1])

    return work


def sleeping(_host: Any, shared: int) -> Callable[[float], tuple[float, int]]:
    def sleep(seconds: float) -> tuple[float, int]:
        time.sleep(seconds)
        return seconds, shared

    return sleep


def fatal(_host: Any, _shared: Any) -> Callable[[Any], Any]:
    return lambda _: os.kill(os.getpid(), signal.SIGKILL)
