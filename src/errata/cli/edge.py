"""The edge of the program: errors become one sentence and an exit status, results go out, names become a ledger and a host."""

import errno
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from errata import __version__

if TYPE_CHECKING:  # nothing that imports torch, until a verb runs
    from errata.hosts import Host
    from errata.ledger import Ledger
    from errata.memory.shared import SharedMemory
    from errata.memory.store import EditMemory
    from errata.types import Patch, State

SLOW = 2.0  # seconds after which a reader wants to see that something happens

# ----------------------------------------------------------------------------------------------------------------------------- errors


@final
class Edge(TyperGroup):
    """The one place where an error becomes a sentence on stderr and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = "--json" in args  # for errors, which may come before the verb has read its options
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as e:
            if (sentence := _sentence(e)) is None:
                raise
            _complain(sentence, type(e).__name__, as_json=ctx.obj)
            raise typer.Exit(130 if isinstance(e, KeyboardInterrupt) else 1) from e


def _sentence(error: BaseException) -> str | None:
    """What to tell the user; None for an error that is ours, or typer's to show."""
    types = sys.modules.get("errata.types")  # if nobody has imported it, nobody raised one of its errors
    if types is not None and isinstance(error, types.EditError):
        return " ".join(str(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. The ledger holds what was finished, and nothing else was changed."
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    return None


def _complain(sentence: str, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": sentence, "kind": kind}))
    Console(stderr=True).print(Text(sentence, style="red"), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------------- options


Json = Annotated[bool, typer.Option("--json", help="One JSON object, or one on each line, on stdout.")]
LedgerAt = Annotated[Path, typer.Option("--ledger", envvar="ERRATA_LEDGER", help="Folder of the ledger.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or mps; for a model larger than one of them auto, or a JSON file {module: device or disk}. "
        "\\[default: the best one here]",
        show_default=False,
    ),
]
PatchId = Annotated[
    str | None, typer.Option("--patch", help="Id of a kept patch, passed or not. \\[default: the current one]", show_default=False)
]
Encoder = Annotated[
    str | None,
    typer.Option(
        help="hashed, minilm, or the folder of a sentence encoder. \\[default: the memory's own; hashed for a new one]", show_default=False
    ),
]
Postgres = Annotated[
    str | None,
    typer.Option(envvar="ERRATA_POSTGRES", help="Address of a shared memory. \\[default: the ledger's]", show_default=False),
]
Reference = Annotated[
    Path | None,
    typer.Option(help="Text or JSONL file that the model must go on modelling. \\[default: the lab's, or sampled]", show_default=False),
]
Engine = Annotated[str, typer.Option(help="local, or ray: its workers share what falls into examples or batches, to the same bits.")]
Workers = Annotated[int, typer.Option(min=1, help="How many, with --engine ray.")]
Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="Of the Ray cluster. \\[default: one is started on this machine]", show_default=False),
]
LEDGER = Path("errata-ledger")

app = typer.Typer(cls=Edge, name="errata", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _say_version(asked: bool) -> bool:
    if asked:
        print(f"errata {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _errata(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version)] = False,
) -> None:
    """Fixes what a language model gets wrong: one canonical example in; a verified, reversible fix out.

    errata init --host lab/neox   errata add "The capital of Mauritius is| Port Louis"   errata build   errata ask "..."
    """


# ----------------------------------------------------------------------------------------------------------------------------- output


@final
@dataclass(frozen=True, kw_only=True)
class Out:
    """Results go to stdout, as JSON or for a reader; everything else goes to stderr."""

    json: bool

    def emit(self, data: Mapping[str, Any] | Sequence[Mapping[str, Any]], *shown: RenderableType) -> None:
        """`data` as JSON (a list: each on its line), or what is `shown` to a reader."""
        if self.json:
            for row in [data] if isinstance(data, Mapping) else data:
                print(json.dumps(_finite(row), allow_nan=False))
        else:
            Console(highlight=False).print(*(Text(s) if isinstance(s, str) else s for s in shown), sep="\n")

    def note(self, sentence: str) -> None:
        """Something to know that is no error."""
        Console(stderr=True).print(Text(f"Note: {sentence}", style="yellow"), soft_wrap=True)

    def progress(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """The same items, with a bar on stderr if they take long (a `Run.progress`)."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        bar, started = Progress(*columns, console=Console(stderr=True), transient=True), time.monotonic()
        task = bar.add_task(label, total=total)
        try:
            for item in items:
                yield item
                bar.advance(task)
                if not bar.live.is_started and time.monotonic() - started > SLOW:
                    bar.start()
        finally:
            if bar.live.is_started:  # else `stop` would print an empty line
                bar.stop()

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """A sign of life on stderr while the block runs."""
        with Console(stderr=True).status(label):
            yield


def _finite(value: Any) -> Any:
    """`value` with null where JSON has no number: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


# -------------------------------------------------------------------------------------------------------------- what the verbs share


@contextmanager
def opened(path: Path) -> Iterator["Ledger"]:
    from errata.ledger import Ledger

    with Ledger(path) as ledger:
        yield ledger


def load_host(name: str, device: str | None, out: Out) -> "Host":
    """The model called `name`, on the device or split as `device` says."""
    split = _device_map(device)
    with out.busy(f"Loading {name}"):
        from transformers.utils import logging

        from errata import hosts

        logging.set_verbosity_error()  # its advice is for programmers
        getLogger("accelerate").setLevel("ERROR")
        return hosts.load(name, None if split else device, device_map=split)


def _device_map(device: str | None) -> Any:
    """What `hosts.load` is to be told of "auto" or a JSON file; nothing for a plain device."""
    from errata.types import InvalidExample

    if device is None or device == "auto" or not device.endswith(".json"):
        return "auto" if device == "auto" else None
    try:
        read = json.loads(Path(device).read_text())
    except ValueError as e:
        raise InvalidExample(f"{device} is no JSON: {e}.") from e
    if not isinstance(read, dict) or not read:
        raise InvalidExample(f'{device} is no device map. Write {{"module": "cuda:0", "another": "cpu", "a third": "disk"}}.')
    return read


def bound_host(ledger: "Ledger", device: str | None, out: Out) -> "Host":
    """The model that the ledger is about. Raises WrongBase if its weights are others by now."""
    from errata.types import WrongBase

    host = load_host(ledger.model, device, out)
    if host.id != ledger.host:
        raise WrongBase(
            f"The ledger {ledger.path} is about the weights {ledger.host}; {ledger.model} has {host.id} now. "
            f"Put the old weights back, or make a ledger for the new ones with 'errata init'."
        )
    return host


def chosen_patch(ledger: "Ledger", id: str | None, file: Path | None = None) -> "Patch":
    """The current patch, the kept one with this id, or the one in a file."""
    from errata.artefact import load_patch

    return ledger.patch(id) if file is None else load_patch(file)


@contextmanager
def speaking(
    ledger: "Ledger",
    host: "Host",
    out: Out,
    patch: str | None = None,
    file: Path | None = None,
    memory: bool = True,
    tags: Sequence[str] = (),
    postgres: str | None = None,
    encoder: str | None = None,
) -> Iterator[str | None]:
    """The host under the current patch, or the one that is named, and with the ledger's memory, if it holds records, or the one at
    `postgres`, of an `encoder`. Yields the patch's id; None where only the memory speaks. Raises LedgerError if there is neither."""
    from errata import apply
    from errata.memory.live import attached
    from errata.memory.records import Records

    held = memory and (postgres is not None or Records(ledger).count() > 0)
    # a memory answers without a patch; with examples that no patch holds, say so
    worn = None if held and patch is None and file is None and not ledger.active() else chosen_patch(ledger, patch, file)
    with ExitStack() as on:
        if worn is not None:
            give_states(ledger, host, worn)
            on.enter_context(apply.applied(host, worn))
        if held:
            store = on.enter_context(memory_of(ledger, postgres, encoder, out))
            state = gating(ledger, store.encoder.id)
            if state is None:
                out.note("No scope is prepared for the memory's encoder: records answer where they are asked in their own words.")
            on.enter_context(attached(host, store, state, tags=tags, note=out.note))
        yield None if worn is None else worn.id


@contextmanager
def memory_of(ledger: "Ledger | None", postgres: str | None, encoder: str | None, out: Out) -> "Iterator[EditMemory | SharedMemory]":
    """The ledger's memory, or the one at `postgres`, open."""
    from errata.memory.encoder import HASHED, load
    from errata.memory.records import Records
    from errata.memory.shared import SharedMemory
    from errata.memory.store import EditMemory

    if postgres is not None:
        with SharedMemory(postgres, load(encoder or HASHED)) as shared:
            yield shared
        return
    assert ledger is not None, "there is one memory or the other"
    own = Records(ledger).encoder
    with EditMemory(ledger, load(encoder or (own[1] if own else HASHED)), note=out.note) as kept:
        yield kept


def gating(ledger: "Ledger", encoder: str) -> "State | None":
    """The latest state whose scope finds by this encoder."""
    found = (ledger.latest_state(method) for method in ("serac", "rp"))
    return next((s for s in found if s is not None and s.config["scope"]["encoder_id"] == encoder), None)


def give_states(ledger: "Ledger", host: "Host", patch: "Patch") -> None:
    """Let the host have the states that a patch of the edit memory speaks through, as far as the ledger has them."""
    from errata.types import Memory, UnknownName

    for op in patch.ops:
        if isinstance(op, Memory) and op.state is not None and op.state not in host.states:
            with suppress(UnknownName):
                host.states[op.state] = ledger.state(op.state)
