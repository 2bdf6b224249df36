"""memory add, list, search, supersede, retract, undo, move: the records of the edit memory, which are looked up and not compiled."""

import json as json_module
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from errata.cli.edge import LEDGER, Encoder, Json, LedgerAt, Out, Postgres, app, memory_of, opened
from errata.cli.shown import short, table

if TYPE_CHECKING:
    from errata.memory.records import RecordRow, Records
    from errata.memory.shared import SharedMemory
    from errata.memory.store import EditMemory
    from errata.types import Record

memory = typer.Typer(no_args_is_help=True, help="The edit memory: records that are looked up at inference.")
app.add_typer(memory, name="memory")

Tags = Annotated[
    list[str] | None, typer.Option("--tag", help="Concern only queries with this tag; may be given again.", show_default=False)
]
Subject = Annotated[str | None, typer.Option(help="What the question is about, as it stands in it.", show_default=False)]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Another name of the subject; may be given again.", show_default=False)]
Since = Annotated[str | None, typer.Option(help="Hold from this time on, as in 2026-11-22.", show_default=False)]
Until = Annotated[str | None, typer.Option(help="Hold up to this time.", show_default=False)]
Source = Annotated[str, typer.Option(help="Where it comes from; kept with it.")]
Id = Annotated[str, typer.Argument(help="Id of a record in force.")]


@contextmanager
def searched(at: Path, postgres: str | None, encoder: str | None, out: Out) -> Iterator["EditMemory | SharedMemory"]:
    """The memory with its encoder, for what needs vectors."""
    with ExitStack() as on:
        ledger = None if postgres is not None else on.enter_context(opened(at))
        yield on.enter_context(memory_of(ledger, postgres, encoder, out))


@contextmanager
def kept(at: Path, postgres: str | None, encoder: str | None, out: Out) -> Iterator["Records | SharedMemory"]:
    """The records, for what needs no vectors: a ledger's encoder stays where it is."""
    from errata.memory.records import Records
    from errata.memory.shared import SharedMemory

    if postgres is None:
        with opened(at) as ledger:
            yield Records(ledger)
    else:
        with searched(at, postgres, encoder, out) as shared:
            assert isinstance(shared, SharedMemory)
            yield shared


def plain(row: "RecordRow") -> dict[str, Any]:
    began = {"since": row.begun.at, "until": row.ended.at if row.ended else None, "ended by": row.ended.what if row.ended else None}
    own = {"provenance": row.provenance, "supersedes": list(row.supersedes), "active": row.active, "in force": began}
    return {"id": row.record.id} | row.record.as_dict() | own


def shown(rows: "list[RecordRow]") -> RenderableType:
    cells = [(short(r.record.id), str(r.record.example), _scope(r.record), r.provenance, _state(r)) for r in rows]
    return table("id", "record", "concerns", "from", "", rows=cells)


def _scope(record: "Record") -> str:
    parts = [", ".join(record.tags), f"also {', '.join(record.aliases)}" if record.aliases else ""]
    parts += [f"since {record.since}" if record.since else "", f"until {record.until}" if record.until else ""]
    return "; ".join(part for part in parts if part)


def _state(row: "RecordRow") -> str:
    return "" if row.ended is None else f"{row.ended.what.removeprefix('memory ')} {row.ended.at[:19]}"


def _record(
    text: str, subject: str | None, aliases: list[str] | None, tags: list[str] | None, since: str | None, until: str | None
) -> "Record":
    from errata.build import parse
    from errata.types import Record

    example = replace(parse(text), subject=subject)
    return Record(example=example, aliases=tuple(aliases or ()), tags=tuple(tags or ()), since=since, until=until)


def read_records(path: Path) -> "list[Record]":
    """Records from JSONL: prompt, target, and what else there is of subject, aliases, tags, since, until. Raises InvalidExample."""
    from errata import text
    from errata.types import InvalidExample, Record

    records = []
    for where, line in text.lines(path, "file of records", InvalidExample):
        try:
            records.append(Record.from_dict(json_module.loads(line)))
        except (ValueError, TypeError, AttributeError) as e:
            raise InvalidExample(f"{where} is no record: {e}") from e
    return records


@memory.command()
def add(
    texts: Annotated[list[str] | None, typer.Argument(help="'The capital of Mauritius is| Port Louis': the bar ends the question.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL with prompt, target, subject, aliases, tags, since, until.")] = None,
    subject: Subject = None,
    alias: Aliases = None,
    tag: Tags = None,
    since: Since = None,
    until: Until = None,
    source: Source = "",
    clash: Annotated[str, typer.Option(help="What to do with a record that contradicts: refuse or supersede.")] = "refuse",
    encoder: Encoder = None,
    postgres: Postgres = None,
    at: LedgerAt = LEDGER,
    json: Json = False,
) -> None:
    """Put records into the memory: they are found at once, without a build."""
    from errata.memory.records import check_clash
    from errata.types import InvalidExample

    out, way = Out(json=json), check_clash(clash)
    records = [_record(text, subject, alias, tag, since, until) for text in texts or ()]
    if file is not None and any((subject, alias, tag, since, until)):
        raise InvalidExample("Of a --file each line has its own subject, aliases, tags and times: write them there.")
    if file is not None:
        records += read_records(file)
    if not records:
        raise InvalidExample("No record was given. Write 'question| answer', or name a --file.")
    with searched(at, postgres, encoder, out) as store:
        ids = store.add(*records, clash=way, provenance=source or str(file or ""))
        rows = [store.listed(id)[-1] for id in dict.fromkeys(ids)]
    out.emit([plain(row) for row in rows], shown(rows))


@memory.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also those that are no longer in force.")] = False,
    encoder: Encoder = None,
    postgres: Postgres = None,
    at: LedgerAt = LEDGER,
    json: Json = False,
) -> None:
    """The records in force, in the order in which they came."""
    out = Out(json=json)
    with kept(at, postgres, encoder, out) as store:
        rows = [row for row in store.listed() if everything or row.active]
    out.emit([plain(row) for row in rows], shown(rows))


@memory.command()
def search(
    query: Annotated[str, typer.Argument(help="What the model would be asked.")],
    k: Annotated[int, typer.Option("--k", min=1, help="How many.")] = 8,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag of the query; may be given again.", show_default=False)] = None,
    moment: Annotated[str | None, typer.Option("--when", help="Search as of this time. \\[default: now]", show_default=False)] = None,
    encoder: Encoder = None,
    postgres: Postgres = None,
    at: LedgerAt = LEDGER,
    json: Json = False,
) -> None:
    """The records nearest to a query. Near is not yet in scope: the score is the cosine of the two questions."""
    out = Out(json=json)
    with searched(at, postgres, encoder, out) as store:
        hits = store.search(query, k, tags=tag or (), at=moment)
    rows = [(f"{hit.score:.3f}", short(hit.record.id), Text(str(hit.record.example)), _scope(hit.record)) for hit in hits]
    out.emit(
        [{"score": hit.score, "question": hit.question} | plain(hit.row) for hit in hits],
        table("score", "id", "record", "concerns", rows=rows),
    )


@memory.command()
def supersede(
    id: Id,
    text: Annotated[str, typer.Argument(help="'question| answer', in its place.")],
    subject: Subject = None,
    alias: Aliases = None,
    tag: Tags = None,
    since: Since = None,
    until: Until = None,
    source: Source = "",
    encoder: Encoder = None,
    postgres: Postgres = None,
    at: LedgerAt = LEDGER,
    json: Json = False,
) -> None:
    """Put a record in the place of another one; 'errata memory undo' brings that one back."""
    out, record = Out(json=json), _record(text, subject, alias, tag, since, until)
    with searched(at, postgres, encoder, out) as store:
        row = store.listed(store.supersede(id, record, source))[-1]
    out.emit(plain(row), shown([row]))


@memory.command()
def retract(id: Id, encoder: Encoder = None, postgres: Postgres = None, at: LedgerAt = LEDGER, json: Json = False) -> None:
    """Take a record out of the memory. What it had superseded stays out."""
    out = Out(json=json)
    with kept(at, postgres, encoder, out) as store:
        whole = store.retract(id)
    out.emit({"retracted": whole}, f"Retracted {short(whole)}.")


@memory.command()
def undo(id: Id, encoder: Encoder = None, postgres: Postgres = None, at: LedgerAt = LEDGER, json: Json = False) -> None:
    """Take a record out of the memory and bring back what it had superseded."""
    out = Out(json=json)
    with kept(at, postgres, encoder, out) as store:
        back = store.undo(id)
    told = f"back: {', '.join(map(short, back))}" if back else "it had taken no other's place"
    out.emit({"undone": id, "back": list(back)}, f"Undone {id}; {told}.")


@memory.command()
def move(
    encoder: Annotated[str, typer.Argument(help="hashed, minilm, or the folder of a sentence encoder.")],
    at: LedgerAt = LEDGER,
    json: Json = False,
) -> None:
    """Take the ledger's memory to another encoder: all its questions are encoded again."""
    from errata.memory.encoder import load
    from errata.memory.records import Records
    from errata.memory.store import moved

    out, made = Out(json=json), load(encoder)
    with opened(at) as ledger:
        with out.busy(f"Encoding {Records(ledger).count()} questions"):
            moved(ledger, made, note=out.note)
    out.emit({"encoder": made.name, "id": made.id}, f"The memory is of the encoder {made.name} now ({short(made.id)}).")
