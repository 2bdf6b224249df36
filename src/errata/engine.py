"""More than one machine: a `Run.spread` whose shards are done by the workers of a Ray cluster.

    with on_ray(workers=2) as spread:
        errata.edit(host, examples, "ultraedit", spread=spread)

Each worker is a process that loads the model by its name, once, and is given shards as it gets done with them; results come back in the
order of the shards, so whoever adds them up gets the bits that one process gets (on the same kind of machine: another processor's or GPU's
arithmetic may end in other digits). A worker is nothing that could not be made again: one that dies comes back empty, loads the model
anew, and is given its shards again. Nothing here knows a method or what a shard is.
"""

import io
import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from errata import hosts
from errata.hosts import Host
from errata.types import Begin, EditError, EngineError, MissingExtra, Spread, UnknownName, WrongBase, here

ENGINES = ("local", "ray")
AHEAD = 2  # shards that a worker has at once: one to do, and one so that it need not wait for the next
KEPT = 4  # results for each worker, at most, that wait for an earlier one
# of a Ray that is started here: it would send usage over the network, and give way to every other program
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
PATIENCE = 10  # seconds until a cluster must have answered
RETRIES = 5  # times that a shard is given again after its worker died: one that kills every worker must not go on for ever


def check(engine: str) -> None:
    """Raises UnknownName for an engine that is none, MissingExtra for one that is not installed."""
    if engine not in ENGINES:
        raise UnknownName.among("engine", engine, ENGINES)
    if engine == "ray":
        _ray()


def _ray() -> Any:
    try:
        import ray
    except ImportError as e:
        raise MissingExtra('Workers need Ray, which is not installed: pip install "errata[ray]".') from e
    return ray


@contextmanager
def chosen(engine: str, workers: int = 2, address: str | None = None) -> Iterator[Spread]:
    """The spread of an engine by its name. Raises UnknownName, and what `on_ray` raises."""
    check(engine)
    if engine == "local":
        yield here
        return
    with on_ray(workers, address) as spread:
        yield spread


@contextmanager
def on_ray(workers: int = 2, address: str | None = None) -> Iterator[Spread]:
    """Where shards are done while the block lasts: on `workers` of the cluster at `address`, or without one of a Ray of this machine alone,
    which is started and stopped with the block. Where the program has joined a cluster already, it is that one.

    Every machine of a cluster needs Errata, and the model under the same name; a worker takes as many cores as torch has threads here, and
    a share of a GPU if the model is on one here. Raises MissingExtra, EngineError.
    """
    ray = _ray()
    if workers < 1:
        raise EngineError(f"There is no work without a worker: ask for 1 or more, not {workers}.")
    threads, joined = torch.get_num_threads(), ray.is_initialized()
    with nullcontext() if joined else _joined(ray, workers * threads, address):
        crew = _Crew(ray, workers, threads)
        try:
            yield crew.spread
        finally:
            crew.leave()


@contextmanager
def _joined(ray: Any, cores: int, address: str | None) -> Iterator[None]:
    with _hushed(ray):
        _join(ray, cores, address)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _hushed(ray: Any) -> Iterator[None]:
    """Whatever it is told not to log, Ray prints a paragraph on stdout for each worker that dies: among what `--json` gives."""
    room = ray._private.worker
    aloud = getattr(room, "print_to_stdstream", None)
    room.print_to_stdstream = lambda *_given, **_named: None
    try:
        yield
    finally:
        room.print_to_stdstream = aloud


def _join(ray: Any, cores: int, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address:
            _reach(address)
            ray.init(address=address, **quiet)
        else:
            with _environment(RAY):
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    except (OSError, ValueError, RuntimeError) as e:
        raise EngineError(f"No Ray cluster to be had {f'at {address}' if address else 'on this machine'}: {e}") from e


def _reach(address: str) -> None:
    """Raises OSError if nobody is there: Ray would try for minutes."""
    where, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((where, int(port)), PATIENCE).close()


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@final
class _Crew:
    """The workers of one host; with another host they are others."""

    def __init__(self, ray: Any, workers: int, threads: int) -> None:
        self.ray, self.workers, self.threads = ray, workers, threads
        self.host = ""
        self.members: list[Any] = []

    def leave(self) -> None:
        for worker in self.members:
            self.ray.kill(worker)
        self.members = []

    def spread(self, host: Host, begin: Begin, shards: Sequence[Any], shared: Any) -> Iterator[Any]:
        """A `Run.spread`. Raises WrongBase, EngineError, and what `begin` and the shards raise."""
        if not shards:
            return
        self._meet(host)
        work = [self.ray.put(_packed((begin, shared)))]  # in a list, for it is the worker that looks into it, once
        idle, doing, done = deque(self.members * AHEAD), dict[Any, tuple[int, Any]](), dict[int, Any]()
        given = 0
        for i in range(len(shards)):
            while i not in done:
                while idle and given < min(len(shards), i + KEPT * len(self.members)):
                    worker = idle.popleft()
                    doing[worker.do.remote(work, _packed(shards[given]))] = (given, worker)
                    given += 1
                (ready, *_), _ = self.ray.wait(list(doing))
                at, worker = doing.pop(ready)
                done[at] = ready
                idle.append(worker)
            yield _unpacked(self._result(done.pop(i)), host.device)

    def _result(self, ref: Any) -> bytes:
        try:
            result: bytes = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, EditError):  # what it would have been here
                raise e.cause from None
            raise
        except self.ray.exceptions.RayActorError as e:
            raise EngineError(f"The workers died {RETRIES + 1} times on the same work. Have they memory enough? {e}") from e
        return result

    def _meet(self, host: Host) -> None:
        """Sees to it that the workers are those of this host; they load it when they get their first shard."""
        if host.worn:
            raise WrongBase(
                f"{host.name} wears patch {host.id}, and workers load it without. Take the patch off, or stay with one process."
            )
        gpus = self._gpus(host) if host.device.type == "cuda" else 0.0
        if self.members and self.host == host.id:
            return
        cores = self.ray.cluster_resources().get("CPU", 0)
        if cores < self.workers * self.threads:
            raise EngineError(
                f"{self.workers} workers with {self.threads} threads each, as many as there are here, do not fit the {cores:.0f} cores "
                f"of the cluster. Ask for fewer, or set OMP_NUM_THREADS to fewer threads."
            )
        self.leave()
        kept = {"max_restarts": -1, "max_task_retries": RETRIES, "num_cpus": self.threads, "num_gpus": gpus}
        name = str(Path(host.name).resolve()) if Path(host.name).is_dir() else host.name
        made, split = self.ray.remote(**kept)(Worker), getattr(host.model, "hf_device_map", None)
        self.members = [made.remote(name, host.id, host.model.dtype, host.device.type, self.threads, split) for _ in range(self.workers)]
        self.host = host.id

    def _gpus(self, host: Host) -> float:
        there = self.ray.cluster_resources().get("GPU", 0)
        if not there:
            raise EngineError(f"{host.name} is on a GPU here, and the cluster has none. Load it with --device cpu.")
        return 1 / -(-self.workers // int(there))  # a share that fits so many times into each


@final
class Worker:
    """One process of a crew: the model, and what is to be done with each shard."""

    def __init__(self, name: str, id: str, dtype: torch.dtype, device: str, threads: int, split: Mapping[str, Any] | None = None) -> None:
        self.name, self.id, self.dtype, self.device, self.threads, self.split = name, id, dtype, device, threads, split
        self.host: Host | None = None
        self.begun: tuple[Any, Any] = (None, None)  # (where it came from, what is done with each shard)

    def do(self, work: list[Any], shard: bytes) -> bytes:
        """The result of one shard."""
        import ray

        host = self.host or self._loaded()
        if self.begun[0] != work[0]:
            self.begun = (None, None)  # what was shared before goes first
            begin, shared = _unpacked(ray.get(work[0]), host.device)
            self.begun = (work[0], begin(host, shared))
        return _packed(self.begun[1](_unpacked(shard, host.device)))

    def _loaded(self) -> Host:
        # as many threads as the driver has: how many share a sum decides about its last digits
        torch.set_num_threads(self.threads)
        host = hosts.load(self.name, self.device, self.dtype, self.split)
        if host.id != self.id:
            raise WrongBase(f"{self.name} has the weights {self.id} here, and {host.id} where a worker loads it. Give both the same files.")
        self.host = host
        return host


def _packed(value: Any) -> bytes:
    """Bytes of anything that can be pickled; unlike a plain pickle of a tensor on a GPU they can be read where that GPU is not."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes, device: torch.device) -> Any:
    """The value, as it was; what was on a GPU is on `device`."""
    return torch.load(io.BytesIO(packed), map_location=partial(_place, device), weights_only=False)


def _place(device: torch.device, storage: Any, was: str) -> Any:
    return storage if was == "cpu" else torch.serialization.default_restore_location(storage, str(device))  # type: ignore[no-untyped-call]
