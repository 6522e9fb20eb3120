"""The house: imports only go down, packages form no cycle, files stay small."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import megatron_samoe

ROOT = Path(megatron_samoe.__file__).parent
REPOSITORY = ROOT.parent

#: Bottom first; packages of one floor do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("children", "installation"),
    ("errors", "log", "parsing", "plain_help", "start", "moved"),
    ("__init__",),
    ("config",),
    ("parallel_state",),
    ("ops",),
    ("row_exchange",),
    ("tensor_parallel",),
    ("moe",),
    ("models",),
    ("pipeline_parallel",),
    ("distributed",),
    ("optimizer",),
    ("dist_checkpointing",),
    ("datasets",),
    ("planning", "runtime"),
    ("training", "inference", "convert", "evaluation"),
    ("language_model", "fit", "plugins", "interop", "compress"),
    ("cli",),
    ("gpu_check",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MAX_LINES = 400
#: Files that have outgrown a page, by path in the repository; a name leaves the list when its file has shrunk.
LONG_FILES: frozenset[str] = frozenset()
#: Files that nothing here imports but the plug-in: they are copied beside exported weights, for transformers to load.
REMOTE_CODE = tuple(
    f"convert/hf/remote_code/{name}_samoe.py" for name in ("configuration", "modeling", "attention", "moe")
)
#: The plug-ins', which vLLM imports, or a program of Megatron-Core's.
PLUG_IN = (
    *(f"plugins/vllm/{name}.py" for name in ("__init__", "model", "plain_experts")),
    *(f"plugins/megatron_core/{name}.py" for name in ("__init__", "candidates", "experts", "rank_layout", "sharing")),
)


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def benchmarks() -> list[Path]:
    """Returns the files of tools/benchmarks, which may import all of the package."""
    return sorted((REPOSITORY / "tools/benchmarks").glob("*.py"))


def package_of(path: Path) -> str:
    """Returns the package (or module) directly below megatron_samoe that a file is part of."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, module: str) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of all imports in a module, wherever they stand."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            # `from package import module` may name a module, `from module import name` does not: both are kept.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def edges(path: Path) -> list[tuple[int, str]]:
    """Returns (line, package) of a file's imports of other packages of megatron_samoe."""
    module = ".".join(("megatron_samoe", *path.relative_to(ROOT).with_suffix("").parts))
    found = []
    for line, name in imported_modules(ast.parse(path.read_text()), module):
        parts = name.split(".")
        if parts[0] == "megatron_samoe":
            known = len(parts) > 1 and parts[1] in FLOOR_OF
            found.append((line, parts[1] if known else "__init__"))
    return [(line, package) for line, package in found if package != package_of(path)]


def rising_imports(path: Path) -> list[str]:
    own = FLOOR_OF[package_of(path)]
    return [
        f"{path.relative_to(ROOT)}:{line} (floor {own}) imports {package} (floor {FLOOR_OF[package]})"
        for line, package in edges(path)
        if FLOOR_OF[package] >= own
    ]


def test_every_package_has_a_floor() -> None:
    assert {package_of(path) for path in sources()} <= set(FLOOR_OF)


def test_imports_only_go_down() -> None:
    rising = [fault for path in sources() for fault in rising_imports(path)]
    assert not rising, "\n".join(rising)


@pytest.mark.parametrize(
    ("statement", "rises"),
    [
        ("from megatron_samoe.errors import ConfigError", False),
        ("from megatron_samoe.config import PretrainConfig", False),
        ("import megatron_samoe.moe.router", True),
        ("from megatron_samoe import training", True),
        ("def f():\n    from megatron_samoe.models import attention", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..cli import pretrain", True),
        ("from .reference import topk_gate", False),
    ],
)
def test_the_rule_sees_every_kind_of_import(
    statement: str, rises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops" / "new.py"
    path.write_text(statement)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert bool(rising_imports(path)) == rises


def test_packages_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in FLOOR_OF}
    for path in sources():
        graph[package_of(path)] |= {package for _, package in edges(path)}
    refuse_cycles(graph)


def refuse_cycles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"they import each other: {' -> '.join(error.args[1])}")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def file_imports(path: Path, modules: set[str]) -> set[str]:
    """Returns those of some modules that a file imports, deferred imports included."""
    module = module_of(path)
    found = set()
    for _, name in imported_modules(ast.parse(path.read_text()), module):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        # A package's __init__ re-exports what is below it.
        if name and name != module and not module.startswith(name + "."):
            found.add(name)
    return found


def test_files_form_no_cycle() -> None:
    paths = {module_of(path): path for path in (*sources(), *benchmarks())}
    refuse_cycles({name: file_imports(path, set(paths)) for name, path in paths.items()})


def test_the_package_imports_nothing_of_tools() -> None:
    """But by the command that looks there: a wheel has no tools."""
    for path in sources():
        names = [name for _, name in imported_modules(ast.parse(path.read_text()), module_of(path))]
        assert not [name for name in names if name.partition(".")[0] == "tools"], path


def names_of(path: Path) -> set[str]:
    """Returns what a module binds at its top, and the modules below it where it is a package."""
    found = (
        {p.stem for p in path.parent.iterdir() if p.suffix == ".py" or p.is_dir()} if path.stem == "__init__" else set()
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found


def lost_imports(path: Path, names: dict[str, set[str]]) -> list[str]:
    """Returns what a file imports of some modules (each with its names) that they do not have."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (module := node.module or "") in names:
            found += [f"{path.name}:{node.lineno} {module}.{a.name}" for a in node.names if a.name not in names[module]]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OUR_PACKAGES:
            found += [f"{path.name}:{node.lineno} {node.module}"] if node.module not in names else []
    return found


OUR_PACKAGES = ("megatron_samoe", "tests", "tools")


def test_tests_and_tools_import_what_there_is() -> None:
    """A file that cannot be imported is an error that the tests of the changed room do not show."""
    paths = [path for package in OUR_PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    names = {module_of(path): names_of(path) for path in paths}
    for path in paths:  # A folder without __init__ is a package too.
        names.setdefault(module_of(path.parent / "x").rpartition(".")[0], {p.stem for p in path.parent.iterdir()})
    lost = [fault for path in paths for fault in lost_imports(path, names)]
    assert not lost, "\n".join(lost)


def test_files_stay_small() -> None:
    files = [*sources(), *(REPOSITORY / "tools").rglob("*.py"), *(REPOSITORY / "cpp_ext").rglob("*.cpp")]
    lengths = {str(p.relative_to(REPOSITORY)): len(p.read_text().splitlines()) for p in files}
    long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert set(long) <= LONG_FILES, f"files of more than {MAX_LINES} lines: {long}; listed: {sorted(LONG_FILES)}"


def test_public_functions_and_classes_have_docstrings() -> None:
    bare = []
    for path in (*sources(), *benchmarks()):
        for node in ast.parse(path.read_text()).body:
            kinds = (ast.FunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and not node.name.startswith("_") and ast.get_docstring(node) is None:
                bare.append(f"{path.relative_to(REPOSITORY)}: {node.name}")
    assert not bare, "\n".join(bare)


def test_importing_a_module_needs_no_optional_library() -> None:
    deferred = {"apex", "transformers", "megatron", "lm_eval", "vllm", "gguf"}
    for path in (p for p in sources() if str(p.relative_to(ROOT)) not in (*REMOTE_CODE, *PLUG_IN)):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                used = {name.split(".")[0] for name in names} & deferred
                assert not used, f"{path.relative_to(ROOT)}:{node.lineno} imports {used} when it is loaded"


def test_remote_code_is_imported_by_the_plug_in_alone_and_imports_nothing_of_ours() -> None:
    for path in (p for p in sources() if str(p.relative_to(ROOT)) not in PLUG_IN):
        module = ".".join(("megatron_samoe", *path.relative_to(ROOT).with_suffix("").parts))
        names = [name for _, name in imported_modules(ast.parse(path.read_text()), module)]
        if str(path.relative_to(ROOT)) in REMOTE_CODE:
            strange = [n for n in names if n.startswith("megatron_samoe") and "_samoe." not in n.partition(".")[2]]
        else:
            strange = [n for n in names if "hf.remote_code." in n and "_samoe" in n.partition(".")[2]]
        assert not strange, f"{path.relative_to(ROOT)}: {strange}"


def test_every_program_runs_as_a_module() -> None:
    """A file with a `main` that `python -m` would import and leave says nothing and succeeds."""
    silent = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
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
    trees = {path: ast.parse(path.read_text()) for path in sources()}
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
