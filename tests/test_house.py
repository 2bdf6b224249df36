"""The house itself: imports point one way, the public surface is complete and sorted, the commented tree in the README is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import errata

SOURCE = Path(errata.__file__).parent
ROOT = SOURCE.parents[1]
# From top to bottom as in the README: a room may import only rooms above it, whether at the top of the file or inside a function.
ORDER = (
    ("types", "models", "lab.world", "lab.freeze"),
    ("lab.corpus",),
    ("artefact",),
    ("hosts",),
    ("hooks", "engine"),
    ("text", "memory.encoder"),
    ("memory.index", "memory.vectors", "memory.scope", "memory.reader", "memory.activations"),
    ("memory.route",),
    ("methods",),
    ("apply",),
    ("processor",),
    ("gate",),
    ("ledger",),
    ("memory",),
    ("build",),
    ("compact", "choose"),
    ("tasks",),
    ("evaluate",),
    ("drawdown",),
    ("report",),
    ("export",),
    ("lab",),
    ("protocol",),
    ("demo",),
    ("cli",),
)
FLOOR = {room: depth for depth, rooms in enumerate(ORDER) for room in rooms}
METHODS_MAY = {"types", "hosts", "hooks", "text", "memory.encoder", "memory.scope", "memory.reader", "memory.activations", "methods"}


def room_of(module: str) -> str:
    """`errata.lab.world` -> lab.world, `errata.methods.lora` -> methods."""
    parts = module.removeprefix("errata.").split(".")
    return next((r for r in (".".join(parts[:2]), parts[0]) if r in FLOOR), parts[0])


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports. `errata.types` under TYPE_CHECKING may name what stands below it."""
    tree = ast.parse(path.read_text())
    skip = {id(n) for top in ast.walk(tree) if isinstance(top, ast.If) and "TYPE_CHECKING" in ast.dump(top.test) for n in ast.walk(top)}
    out: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("errata"):
            submodules = [f"{node.module}.{a.name}" for a in node.names]
            out |= {
                m if (SOURCE / Path(*m.split(".")[1:])).with_suffix(".py").exists() or m.count(".") == 1 else node.module
                for m in submodules
            }
        elif isinstance(node, ast.Import):
            out |= {a.name for a in node.names if a.name.startswith("errata.")}
    return {m for m in out if m != "errata"}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def module_of(path: Path) -> str:
    return "errata." + ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def test_every_file_has_a_floor() -> None:
    assert {room_of(module_of(p)) for p in FILES} <= FLOOR.keys()


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module_of(p)} imports {m}"
        for p in FILES
        for m in imported(p)
        if m.split(".")[1] != "__version__" and room_of(m) != room_of(module_of(p)) and FLOOR[room_of(m)] >= FLOOR[room_of(module_of(p))]
    ]
    assert not wrong


def test_a_method_imports_only_what_stands_above_it() -> None:
    for path in (SOURCE / "methods").glob("*.py"):
        assert {room_of(m) for m in imported(path)} <= METHODS_MAY, path.name


def test_no_room_is_called_utils() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "common", "core", "helpers", "base", "base2")]


def test_types_imports_torch_only() -> None:
    names = {n.split(".")[0] for node in ast.walk(ast.parse((SOURCE / "types.py").read_text())) for n in _names(node)}
    assert names - set(sys.stdlib_module_names) <= {"torch", "errata"}


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_all_is_complete_and_sorted_and_everything_in_it_is_there() -> None:
    assert list(errata.__all__) == sorted(errata.__all__)
    assert set(errata.__all__) == set(errata._ROOMS) | {"__version__"}
    for name in errata.__all__:
        assert getattr(errata, name) is not None


def test_import_errata_is_light() -> None:
    code = "import sys, errata, errata.cli; print([m for m in ('torch', 'transformers', 'scipy', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commented_tree_in_the_readme_is_the_tree() -> None:
    tree = re.search(r"```text\nsrc/errata/\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree, "README.md has no commented tree"
    named = {line.split()[1].rstrip("/") for line in tree[1].splitlines() if "── " in line and line[0] in "├└"}
    assert named == {p.name for p in SOURCE.iterdir() if p.is_file() or p.name != "__pycache__"}
