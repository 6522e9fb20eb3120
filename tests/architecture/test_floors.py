"""The house: imports only go down, files form no cycle and stay small, the way to the first step is short, words are the field's.

Docstrings and imports that must wait are rules of ruff (pyproject.toml); mypy, and pytest as it collects, see names that are not there.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

import megatron_samoe

ROOT = Path(megatron_samoe.__file__).parent
REPOSITORY = ROOT.parent

#: Of each package, or module that is in none, how many floors are below it.
FLOOR_OF: dict[str, int] = {
    name: floor
    for floor, names in enumerate(yaml.safe_load(Path(__file__).with_name("floors.yaml").read_text()))
    for name in names.split()
}
MAX_LINES = 400


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def benchmarks() -> list[Path]:
    """Returns the files of tools/benchmarks, which may import all of the package."""
    return sorted((REPOSITORY / "tools/benchmarks").glob("*.py"))


def package_of(path: Path) -> str:
    """Returns the package (or module) directly below megatron_samoe that a file is part of."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of all imports in a file, wherever they stand."""
    module = path.relative_to(REPOSITORY).with_suffix("").parts
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(module[: -node.level] if node.level else ()), *filter(None, [node.module])])
            # `from package import module` may name a module, `from module import name` does not: both are kept.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def rising_imports(path: Path) -> list[str]:
    own, rising = package_of(path), []
    for line, name in imports_of(path):
        top, _, below = name.partition(".")
        package = below.partition(".")[0] if below.partition(".")[0] in FLOOR_OF else "__init__"
        if top == "megatron_samoe" and package != own and FLOOR_OF[package] >= FLOOR_OF[own]:
            floors = f"(floor {FLOOR_OF[own]}) imports {package} (floor {FLOOR_OF[package]})"
            rising.append(f"{path.relative_to(ROOT)}:{line} {floors}")
    return rising


def test_every_package_has_a_floor() -> None:
    assert {package_of(path) for path in sources()} <= set(FLOOR_OF)


def test_imports_only_go_down() -> None:
    rising = [fault for path in sources() for fault in rising_imports(path)]
    assert not rising, "\n".join(rising)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def file_imports(path: Path, modules: set[str]) -> set[str]:
    """Returns those of some modules that a file imports, deferred imports included."""
    module = module_of(path)
    found = set()
    for _, name in imports_of(path):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        # A package's __init__ re-exports what is below it.
        if name and name != module and not module.startswith(name + "."):
            found.add(name)
    return found


def test_files_form_no_cycle() -> None:
    """Nor do packages, whose imports only go down."""
    paths = {module_of(path): path for path in (*sources(), *benchmarks())}
    try:
        TopologicalSorter({name: file_imports(path, set(paths)) for name, path in paths.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"they import each other: {' -> '.join(error.args[1])}")


def test_the_package_imports_nothing_of_tools() -> None:
    """But by the command that looks there: a wheel has no tools."""
    for path in sources():
        assert not [name for _, name in imports_of(path) if name.partition(".")[0] == "tools"], path


def test_files_stay_small() -> None:
    files = [*sources(), *(REPOSITORY / "tools").rglob("*.py"), *(REPOSITORY / "cpp_ext").rglob("*.cpp")]
    lengths = {str(p.relative_to(REPOSITORY)): len(p.read_text().splitlines()) for p in files}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def test_remote_code_is_imported_by_the_plug_ins_alone_and_imports_nothing_of_ours() -> None:
    """It is copied beside exported weights, for transformers to load."""
    for path in (p for p in sources() if package_of(p) != "plugins"):
        names = [name for _, name in imports_of(path)]
        if path.parent.name == "remote_code" and path.stem.endswith("_samoe"):
            strange = [n for n in names if n.startswith("megatron_samoe") and "_samoe." not in n.partition(".")[2]]
        else:
            strange = [n for n in names if "hf.remote_code." in n and "_samoe" in n.partition(".")[2]]
        assert not strange, f"{path.relative_to(ROOT)}: {strange}"


def test_every_program_runs_as_a_module() -> None:
    """A file with a `main` that `python -m` would import and leave says nothing and succeeds."""
    silent = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = tree_of(path)
        made = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        has_main = any(len(node.args.args) == len(node.args.defaults) for node in made)
        has_main |= any(ast.unparse(node).startswith("main = ") for node in tree.body if isinstance(node, ast.Assign))
        if has_main and "__name__" not in ast.dump(tree.body[-1]):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


#: Where a way of sharing has its name and its classes: what options and files see of it, what computes it, and our class
#: for transformers, which travels alone.
ROOMS_OF_WAYS = ("config/sharing_map.py", "moe/sharing/", "convert/hf/remote_code/configuration_samoe.py")
WAYS = {"own", "combined", "tied", "scaled", "neighbours"}


def questions_of_kind(tree: ast.AST, classes: frozenset[str]) -> list[int]:
    """Returns the lines that compare a way's name, or ask whether something is of one of these classes."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            words = {part.value for part in parts if isinstance(part, ast.Constant)}
            words |= {part.id.lower() for part in parts if isinstance(part, ast.Name) and part.id.isupper()}
            if words & WAYS:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            if {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node.args[1])} & classes:
                lines.append(node.lineno)
    return lines


def test_a_way_of_sharing_is_known_by_name_and_class_in_its_own_rooms_alone() -> None:
    rooms = [path for path in sources() if path.relative_to(ROOT).as_posix().startswith(ROOMS_OF_WAYS)]
    trees = {path: tree_of(path) for path in sources()}
    computing = [trees[path] for path in rooms if path.parent.name == "sharing"]
    classes = frozenset(n.name for tree in computing for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert {"OwnExperts", "ExpertPool", "Coefficients", "StepLender", "MappedLender"} <= classes
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in trees.items()
        if path not in rooms
        for line in questions_of_kind(tree, classes)
    }
    assert not found, "ask the way itself: config/sharing_map.py (Way) or moe/sharing/way.py"
    assert any(questions_of_kind(trees[path], classes) for path in rooms), "the test sees such questions"


def test_the_exchanges_know_nothing_of_the_library_of_the_tests() -> None:
    folders = ("cpp_ext/comm", "cpp_ext/bindings/row_exchange", "megatron_samoe/row_exchange")
    paths = (path for folder in folders for path in (REPOSITORY / folder).iterdir())
    files = [path for path in paths if path.suffix in (".cpp", ".h", ".py")]
    assert len(files) > 20
    for path in files:
        text = path.read_text().lower()
        assert not any(word in text for word in ("fake_nccl", "stand_in", "stand-in", "host_finished", "tests")), path


#: What a reader passes from a command line to the first optimizer step.
MOST_FILES, MOST_CLIMBS = 20, 8


def test_the_way_to_the_first_step_is_short() -> None:
    words = [sys.executable, "-m", "tools.pages.trace_start"]
    shown = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files, climbs = (int(re.findall(rf"^{what}: (\d+)$", shown, re.MULTILINE)[0]) for what in ("files", "climbs"))
    assert "  training/train_step.py" in shown, "the way ends at the step"
    assert 10 < files <= MOST_FILES and climbs <= MOST_CLIMBS, shown


def test_the_loop_stays_a_page() -> None:
    lines = (ROOT / "training/trainer.py").read_text().splitlines()
    assert len(lines) <= 250


#: Odd words may become fewer, not more.
WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text())


@pytest.mark.parametrize("word", WORDS)
def test_an_odd_word_becomes_no_more_frequent(word: str) -> None:
    *better, most = WORDS[word]
    found = len(re.findall(word, "\n".join(path.read_text() for path in sources()), re.IGNORECASE))
    assert found <= most, f"{found} times, {most} are allowed; write: {', '.join(better)}"
