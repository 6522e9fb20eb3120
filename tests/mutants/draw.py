"""Draws mutants: the package with one small wrong change, the same for the same seed.

Operators are Cosmic Ray's and two more. Messages, annotations and decorators are left as they are.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

PROJECT = Path(__file__).resolve().parents[2]
Mutant = dict[str, Any]
Span = tuple[tuple[int, int], tuple[int, int]]
#: What people write by mistake. Others of Cosmic Ray's, such as ** for +, any test finds.
KEPT = re.compile(
    r"core/(ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|Gt_Lt|Is_IsNot|IsNot_Is)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|FloorDiv_Mod|Mod_FloorDiv|Pow_Mul|BitOr_BitAnd"
    r"|BitAnd_BitOr)|ReplaceUnaryOperator_Delete_(Not|USub)|Replace(True|False|And|Or|Break|Continue)With\w+|AddNot"
    r"|NumberReplacer|ZeroIterationForLoop|ExceptionReplacer)"
)
#: Beginnings of what computes nothing, or nothing of a run: errors, messages, imports, texts of several words.
NOTHING = re.compile(
    r"raise\b|import |from .* import |if (typing\.)?TYPE_CHECKING|__(all|version)__ = |f[\"']|(print|logger\.\w+|warnings\.warn)\("
    r"|[\w.]*say\w*\(|\w*Errors?\(|strict=|\w+=\"\w+ [^\"]*\""
)
OTHERS = {"min": "max", "max": "min", "any": "all", "all": "any"}


class ArgumentLeftOut(Operator):
    """A call without one of its named arguments."""

    examples = tuple

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if node.type == "arglist" and node.parent.type == "trailer":
            for child in node.children:
                if child.type == "argument" and child.children[0].type == "name" and child.children[1] == "=":
                    yield child.start_pos, child.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        start = list(self.mutation_positions(node))[index][0]
        place = next(i for i, child in enumerate(node.children) if child.start_pos == start)
        del node.children[max(0, place - 1) : place + 1 + (place == 0)]
        return node


class OtherFunction(ArgumentLeftOut):
    """A call of max for min, of all for any."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if node.type == "name" and node.value in OTHERS and node.get_next_leaf() == "(":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = OTHERS[node.value]
        return node


OPERATORS = {
    name.removeprefix("core/"): get_operator(name)() for name in sorted(operator_names()) if KEPT.fullmatch(name)
}
OPERATORS |= {"ArgumentLeftOut": ArgumentLeftOut(), "OtherFunction": OtherFunction()}


def draw(seed: int, number: int) -> list[Mutant]:
    """Returns mutants of every room of the package, as many as its lines that can be wrong, but at least one."""
    rooms: dict[str, list[tuple[str, list[tuple[str, int]]]]] = {}
    for path in sorted((PROJECT / "megatron_samoe").rglob("*.py")):
        file = str(path.relative_to(PROJECT))
        for changes in _changes(path.read_text()):
            rooms.setdefault(file.split("/")[1].removesuffix(".py"), []).append((file, changes))
    seats = dict.fromkeys(rooms, 1)
    while sum(seats.values()) < number:
        seats[max(rooms, key=lambda room: len(rooms[room]) / (seats[room] + 1))] += 1
    chosen: list[Mutant] = []
    for room, lines in rooms.items():
        generator = random.Random(f"{seed} {room}")
        drawn = (_mutant(file, *generator.choice(changes)) for file, changes in generator.sample(lines, len(lines)))
        chosen += sorted(islice(filter(None, drawn), seats[room]), key=lambda m: (m["file"], m["line"]))
    return [{"seed": seed, **mutant} for mutant in chosen]


def _changes(text: str) -> list[list[tuple[str, int]]]:
    """Returns for each line of a file that can be wrong the operators that can change it, with their occurrence in the file."""
    nothing = list(_computes_nothing(ast.parse(text), text.splitlines()))
    nodes = list(ast_nodes(get_ast(text)))
    found: dict[int, list[tuple[str, int]]] = {}
    for name, operator in OPERATORS.items():
        positions = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (node, start) in enumerate(positions):
            unpacks = "Binary" in name and node.parent.type in ("parameters", "dictorsetmaker")
            if not unpacks and not any(begin <= start < end for begin, end in nothing):
                found.setdefault(start[0], []).append((name, occurrence))
    return [changes for _, changes in sorted(found.items())]


def _computes_nothing(tree: ast.AST, lines: list[str]) -> Iterator[Span]:
    """Yields the parts of a file that are annotations or decorators, or begin as `NOTHING` says."""
    for node in ast.walk(tree):
        parts: list[Any] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        parts += [*getattr(node, "decorator_list", ()), node if hasattr(node, "lineno") else None]
        for part in filter(None, parts):
            ends = ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))  # in bytes
            begin, end = ((line, len(lines[line - 1].encode()[:column].decode())) for line, column in ends)
            is_type = isinstance(part, ast.BinOp) and ast.unparse(part.right) == "None"
            if part is not node or is_type or NOTHING.match(lines[begin[0] - 1], begin[1]):
                yield begin, end


def _mutant(file: str, operator: str, occurrence: int) -> Mutant | None:
    """Returns the lines of a file before and after a change; None if it changes nothing or the result is not Python."""
    text = (PROJECT / file).read_text()
    mutated = mutate_code(text, OPERATORS[operator], occurrence) or text
    with contextlib.suppress(SyntaxError):
        if ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text)):
            old, new = text.split("\n"), mutated.split("\n")
            first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
            last = next(i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
            # A line that goes away takes its neighbour along.
            last = min(last, len(old) - first - 1, len(new) - first - 1)
            before, after = ("\n".join(lines[first : len(lines) - last]) for lines in (old, new))
            return {"file": file, "line": first + 1, "before": before, "after": after, "operator": operator}
    return None
