"""The architecture of the package, read from its sources: rooms, arrows between them, sizes, names."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = (  # top to bottom; a room imports from lower levels only
    {"__main__"},
    {"cli"},
    {"testbed"},
    {"doctor", "compare"},
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
LOOSE = {"__init__", "__main__", "cli", "errors", "files"}
MOST_LINES = 350
LONGEST_NAME = 59  # characters of a test's name


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    """`room.module`; a package is its own folder, the root is empty."""
    return ".".join(path.relative_to(ROOT / "trl_vpo").with_suffix("").parts).removesuffix("__init__").strip(".")


def room(module: str) -> str:
    return module.split(".")[0]


def imported_names(path: Path) -> list[str]:
    """Every name that a file imports, at any depth and under `TYPE_CHECKING`, too: `a.b.c` of `from a.b import c`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: name the package in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


SOURCES = {module_name(path): path for path in python_files("trl_vpo")}


def owner(name: str) -> str:
    while name not in SOURCES:
        name = name.rpartition(".")[0]
    return name


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports."""
    graph = {}
    for module, path in SOURCES.items():
        own = [name.removeprefix("trl_vpo").strip(".") for name in imported_names(path) if room(name) == "trl_vpo"]
        graph[module] = set(map(owner, own)) - {module}
    return graph


def test_every_room_has_a_level_and_a_subject():
    inits = {module for module, path in SOURCES.items() if path.name == "__init__.py" and module}
    assert set(map(room, inits)) == set(LEVEL) - LOOSE
    assert {room(module) for module in SOURCES if module} | {"__main__"} == set(LEVEL)
    assert {path.stem for path in (ROOT / "trl_vpo").glob("*.py")} <= LOOSE
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"docs", "kits", "golden", "scripts", "studies"} <= set(LEVEL) - LOOSE
    one_line = re.compile(r'""".+"""\n')
    assert {init for init in inits if not one_line.fullmatch(SOURCES[init].read_text("utf-8"))} == {"losses"}


def test_arrows_point_down():
    arrows = {
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets - {""}
        if module and room(module) != room(target) and LEVEL[room(module)] >= LEVEL[room(target)]
    }
    assert not arrows
    assert not {module for module, targets in imports().items() if "" in targets} - {"cli"}


def test_no_circles():
    graph = {module: targets - {""} for module, targets in imports().items()}

    @cache
    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = graph[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        return seen

    circles = {
        " ".join(sorted(other for other in reachable(module) if module in reachable(other)))
        for module in graph
        if module in reachable(module)
    }
    assert not circles


def test_losses_import_torch_only():
    names = [name for module in SOURCES if room(module) == "losses" for name in imported_names(SOURCES[module])]
    others = {room(name) for name in names if not name.startswith("trl_vpo.losses.")}
    assert others - sys.stdlib_module_names == {"torch"}


def test_files_and_test_names_are_short():
    files = python_files("trl_vpo", "scripts", "tests", "studies")
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    assert not {path for path, text in texts.items() if text.count("\n") > MOST_LINES}
    name = re.compile(rf"def test_\w{{{LONGEST_NAME - 4},}}\(")
    assert not {path for path, text in texts.items() if path[:6] == "tests/" and name.search(text)}


def test_texts_are_printed_as_they_are():
    """Another console of rich would take brackets in names and paths for markup."""
    makers = {module for module, path in SOURCES.items() if re.search(r"\bConsole\(", path.read_text("utf-8"))}
    assert makers == {"runs.console"}


def test_tests_leave_the_import_path_alone():
    others = [path for path in python_files("tests") if path != Path(__file__)]
    assert not [path for path in others if "sys.path" in path.read_text(encoding="utf-8")]


def test_contributing_shows_every_module():
    """The tree of CONTRIBUTING.md: folders end with a slash, modules stand without their .py."""
    shown, folders = set(), [(0, "")]
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        entry = re.fullmatch(r"( +)([a-z_]+/|[a-z_]+(?:, [a-z_]+)*)(?:  .*)?", line)
        if entry:
            depth, names = len(entry[1]), entry[2]
            folders = [folder for folder in folders if folder[0] < depth]
            if names.endswith("/"):
                folders.append((depth, names))
            else:
                shown |= {"".join(name for _, name in folders).replace("/", ".") + name for name in names.split(", ")}
    assert shown == {module for module, path in SOURCES.items() if path.name != "__init__.py"}
