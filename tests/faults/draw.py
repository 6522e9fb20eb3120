"""Draws faults: small wrong changes of one expression each, the same for the same seed.

A fault is what people write by mistake: a wrong group, a missing factor, a bound off by one, a sign, an argument left out.
Messages, annotations and docstrings are left alone: they change nothing that a run computes.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_samoe"
ROOMS = ("moe", "distributed", "tensor_parallel", "dist_checkpointing", "optimizer", "models")
#: Each is taken for the next one of its row.
GROUPS = ("tp", "dp", "ep", "pp", "cp", "etp", "edp", "pool_dp", "tp_ep")
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//",
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len"}


@dataclass(frozen=True)
class Fault:
    """A wrong text in place of a right one; `line` is where it was when it was drawn, `before` finds it later."""

    file: str
    line: int
    before: str
    after: str
    kind: str


def draw(seed: int, per_room: int) -> list[dict[str, Any]]:
    """Returns faults of every room, at most one of a line."""
    chosen = []
    for room in ROOMS:
        found: dict[tuple[str, int], list[Fault]] = {}
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for fault in faults_of(path):
                found.setdefault((fault.file, fault.line), []).append(fault)
        generator = random.Random(f"{seed} {room}")
        for place in sorted(generator.sample(sorted(found), min(per_room, len(found)))):
            chosen.append(asdict(generator.choice(found[place])))
    return chosen


def faults_of(path: Path) -> Iterator[Fault]:
    """Yields every fault that fits into one line of a file."""
    text = path.read_text()
    lines = text.splitlines()
    for node in _computing(ast.parse(text)):
        for start, end, new, kind in _changes(node, text):
            line = lines[start[0] - 1]
            if start[0] == end[0]:
                # Columns of ast count bytes.
                row = line.encode()
                after = (row[: start[1]] + new.encode() + row[end[1] :]).decode()
                yield Fault(str(path.relative_to(PACKAGE.parent)), start[0], line.strip(), after.strip(), kind)


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes of a tree that compute something: no annotation, no error and its message."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "msg") or isinstance(value, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr, ast.Import)):
                yield from _computing(child)


def _changes(node: ast.AST, text: str) -> Iterator[tuple[tuple[int, int], tuple[int, int], str, str]]:
    """Yields start, end, new text and kind of each fault that a node can have."""
    of = lambda n: ast.get_source_segment(text, n) or ""  # noqa: E731
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        new = f"{of(node.left)} {COMPARISONS[type(node.ops[0])]} {of(node.comparators[0])}"
        yield *_span(node), new, "comparison"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield *_span(node), f"({of(node.left)} {OPERATORS[type(node.op)]} {of(node.right)})", "operator"
        yield *_span(node), f"({of(node.left)})", "missing term or factor"
    elif isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield *_span(node), f"({word.join(of(v) for v in node.values)})", "and for or"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield *_span(node), f"({of(node.operand)})", "negation"
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield *_span(node), str(node.value + 1), "off by one"
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield *_span(node), str(not node.value), "boolean"
    elif (
        isinstance(node, ast.Attribute) and node.attr in GROUPS and of(node.value).split(".")[-1] in ("parallel", "ps")
    ):
        other = GROUPS[(GROUPS.index(node.attr) + 1) % len(GROUPS)]
        yield *_span(node), f"{of(node.value)}.{other}", "wrong group"
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield *_span(node.func), CALLS[node.func.id], "call"
        for keyword in node.keywords:
            if keyword.arg and len(node.args) + len(node.keywords) > 1:
                others = [of(a) for a in node.args] + [of(k) for k in node.keywords if k is not keyword]
                yield *_span(node), f"{of(node.func)}({', '.join(others)})", "argument left out"
    elif isinstance(node, ast.IfExp):
        yield *_span(node), f"({of(node.body)})", "choice left out"


def _span(node: ast.expr) -> tuple[tuple[int, int], tuple[int, int]]:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
