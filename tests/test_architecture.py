"""The architecture of the package, read from its sources: rooms, arrows between them, sizes, names."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = (  # top to bottom; a room imports from lower levels only
    {"__main__"},
    {"cli"},
    {"doctor", "testbed"},
    {"training", "generate", "evaluate", "report"},
    {"trainers"},
    {"models"},
    {"runs"},
    {"data"},
    {"forward"},
    {"media", "text"},
    {"losses", "errors", "files"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LOOSE = {"__init__", "__main__", "cli", "losses", "errors", "files"}
MOST_LINES = 350
LONGEST_NAME = 59  # characters of a test's name

# What does not hold yet.
PENDING = {
    "arrows": {
        "evaluate.lmms.run -> generate.config",
    },
    "circles": {
        "testbed.pretraining testbed.tiny_vlm",
    },
    "inits": {
        "generate",
    },
    "lines": {
        "tests/training/test_resume.py",
        "tests/evaluate/test_evaluate_run.py",
        "tests/evaluate/test_lmms.py",
        "tests/forward/test_scoring.py",
        "tests/runs/test_store.py",
        "tests/trainers/test_precompute.py",
        "tests/trainers/test_trainers.py",
    },
    "names": {
        "tests/evaluate/test_evaluate_run.py",
        "tests/evaluate/test_lmms.py",
        "tests/forward/test_layouts.py",
        "tests/forward/test_scoring.py",
        "tests/test_recipes.py",
        "tests/testbed/test_base.py",
        "tests/testbed/test_selfmade.py",
        "tests/testbed/test_world.py",
        "tests/trainers/test_from_python.py",
        "tests/trainers/test_head_adapters.py",
        "tests/trainers/test_metrics.py",
        "tests/trainers/test_precompute.py",
        "tests/trainers/test_reference.py",
        "tests/trainers/test_reference_pass.py",
    },
}


def expect_only_pending(rule: str, violations: set[str]) -> None:
    pending = PENDING.get(rule, set())
    assert not violations - pending, f"new: {sorted(violations - pending)}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Module -> file, of the package."""
    return {module_name(path): path for path in (ROOT / "trl_vpo").rglob("*.py")}


def imported_names(path: Path) -> Iterator[str]:
    """Every name that a file imports, at any depth and under `TYPE_CHECKING`, too: `a.b.c` of `from a.b import c`."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports."""
    modules = sources()

    def owner(name: str) -> str:
        while name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {owner(name) for name in imported_names(path) if name.split(".")[0] == "trl_vpo"} - {module}
        for module, path in modules.items()
    }


def short(module: str) -> str:
    return module.removeprefix("trl_vpo.")


def room(module: str) -> str:
    return short(module).split(".")[0]


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


# --- imports ------------------------------------------------------------------------------------------------------


def test_every_room_has_a_level():
    modules = set(sources()) - {"trl_vpo"}
    assert {room(module) for module in modules} | {"__main__"} == set(LEVEL)


def test_nothing_else_lies_loose_in_the_root():
    assert {path.stem for path in (ROOT / "trl_vpo").glob("*.py")} <= LOOSE


def test_arrows_point_down():
    arrows = {
        f"{short(module)} -> {short(target)}"
        for module, targets in imports().items()
        for target in targets - {"trl_vpo"}
        if module != "trl_vpo" and room(module) != room(target) and LEVEL[room(module)] >= LEVEL[room(target)]
    }
    expect_only_pending("arrows", arrows)


def test_no_room_imports_the_root():
    importers = {short(module) for module, targets in imports().items() if "trl_vpo" in targets}
    expect_only_pending("root", importers - {"cli"})


def test_no_circles():
    graph = {module: targets - {"trl_vpo"} for module, targets in imports().items()}

    @cache
    def reachable(start: str) -> frozenset[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = graph[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        return frozenset(seen)

    on_circles = [module for module in graph if module in reachable(module)]
    circles = {
        " ".join(sorted(short(other) for other in on_circles if other in reachable(m) and m in reachable(other)))
        for m in on_circles
    }
    expect_only_pending("circles", circles)


def test_losses_import_torch_only():
    packages = {name.split(".")[0] for name in imported_names(ROOT / "trl_vpo/losses.py")}
    assert packages - set(sys.stdlib_module_names) == {"torch"}


def test_inits_are_one_line_of_docstring():
    inits = {module: path for module, path in sources().items() if path.name == "__init__.py" and module != "trl_vpo"}
    full = set()
    for module, path in inits.items():
        text = path.read_text(encoding="utf-8")
        body = ast.parse(text).body
        is_docstring = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if not is_docstring or len(text.splitlines()) != 1:
            full.add(short(module))
    expect_only_pending("inits", full)
    assert {room(module) for module in inits} == set(LEVEL) - LOOSE


# --- sizes and names ----------------------------------------------------------------------------------------------


def test_no_long_files():
    files = python_files("trl_vpo", "scripts", "tests", "studies")
    long = {path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES}
    expect_only_pending("lines", {str(path.relative_to(ROOT)) for path in long})


def test_no_long_test_names():
    long = set()
    for path in python_files("tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > LONGEST_NAME:
                long.add(str(path.relative_to(ROOT)))
    expect_only_pending("names", long)


def test_tests_mirror_the_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"kits", "golden", "scripts", "studies"} <= set(LEVEL) - LOOSE


def test_tests_leave_the_import_path_alone():
    others = [path for path in python_files("tests") if path != Path(__file__)]
    assert not [path for path in others if "sys.path" in path.read_text(encoding="utf-8")]
