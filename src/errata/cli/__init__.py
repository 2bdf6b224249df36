"""The command line: one verb for each arrow of the design.

edge.py      app, errors, output, what verbs share      records.py   init add show log retract verify
edits.py     build ask senses eval export               lab.py       lab card, train, cases; methods; demo
plan.py      what a build would cost                    trace.py     trace
prepare.py   prepare                                memory.py    memory add list search supersede retract undo move
protocol.py  eval canonical                         curve.py     eval alpha
route.py     explain compact

Importing this package imports no model library, so that `errata --help` answers at once: verbs import what they need when they run.
Nothing here knows how anything is done; a verb reads its arguments, calls the rooms and prints what came out.
"""

import sys
from collections.abc import Sequence

from errata.cli import curve, edits, lab, memory, prepare, protocol, records, route, trace  # in this order they stand in the help
from errata.cli.edge import app

__all__ = ["app", "main"]
_VERBS = (edits, curve, prepare, protocol, records, memory, route, trace, lab)  # importing them put their verbs into the app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for what went wrong, 2 for how it was asked, 130 if it was interrupted."""
    try:
        app(sys.argv[1:] if argv is None else list(argv), prog_name="errata")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0
