"""The site: `make docs`. Pages on options and on every module are made from the code when the site is built."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from docutils import nodes
from sphinx.domains.python import PythonDomain

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_samoe import __version__  # noqa: E402
from megatron_samoe.cli import completion  # noqa: E402
from megatron_samoe.cli.command import COMMANDS  # noqa: E402
from megatron_samoe.cli.program import FORMS, Commands, Group  # noqa: E402
from megatron_samoe.config.cli import foreign_flags, what_it_is_here  # noqa: E402
from megatron_samoe.config.derived import flag  # noqa: E402
from megatron_samoe.config.pretrain import PretrainConfig  # noqa: E402
from megatron_samoe.config.schema import texts_of  # noqa: E402
from megatron_samoe.parsing import parse_yaml  # noqa: E402

project, author, version, release = "megatron_samoe", "the authors of megatron_samoe", __version__, __version__
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "megatron_samoe"
html_static_path = ["static", *(f"images/idea_{form}.svg" for form in ("dark", "narrow", "narrow_dark"))]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).with_name("static") / "scorer.js")
smartquotes = False  # two dashes are a flag's
html_copy_source = False
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings = ["config.cache"]
autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_typehints = "signature"
# Every page has the contents of all; with each function in them, that took a fifth of the time.
toc_object_entries = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
#: Where made pages go; git ignores it.
MADE = Path(__file__).with_name("reference")


def text(name: str, lines: list[str]) -> None:
    """Writes a made page, if it is another than before."""
    path, content = MADE / name, "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != content:
        path.write_text(content)


def as_it_stands(line: str) -> str:
    """Returns a line without signs that would be taken for emphasis; what stands in backticks is left alone."""
    return re.sub(r"(`[^`]*`)|([*|])", lambda found: found[1] or f"\\{found[2]}", line)


def read_as_text(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: an indented block of a module's is shown as it stands, and a star is a star. Sphinx would take
    the first of several attributes of one line for the type of the others, if a blank stood between them.
    """
    text, block, attributes = [], False, False
    for before, line in zip(["", *lines], lines, strict=False):
        attributes = line.strip() == "Attributes:" or (attributes and bool(line.strip()))
        if attributes:
            line = re.sub(r"^ +\w+(, \w+)+(?=: )", lambda names: names[0].replace(", ", ","), line)
        if what == "module" and line.startswith("    ") and not before.strip():
            text, block = ([*text, "::", ""] if not block else text), True
        block = block and (not line.strip() or line.startswith("    "))
        text.append(line if block else as_it_stands(line))
    lines[:] = text


def options_page() -> list[str]:
    """Returns the page of all options of training."""
    lines = [
        "# Options",
        "",
        "Every option of `megatron-samoe pretrain`, as a flag. In YAML it stands under its group, with `_` for `-`.",
        "",
    ]
    for group in dataclasses.fields(PretrainConfig):
        kind: Any = type(getattr(PretrainConfig(), group.name))
        texts, hints = texts_of(kind), get_type_hints(kind)
        lines += [f"## {group.name}", "", (inspect.getdoc(kind) or "").split("\n")[0], ""]
        for field in dataclasses.fields(kind):
            # An option of Sphinx's, so that the search leads to it and other pages can.
            lines += [
                "```{option} " + flag(field.name),
                "",
                f"{as_it_stands(texts.get(field.name) or 'See above.')} {choices(hints[field.name])}Default: `{field.default}`.",
                "```",
                "",
            ]
    return lines


def choices(hint: Any) -> str:
    """Returns a sentence with the values that an option may have, where they are few words."""
    named = [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]
    return f"One of {', '.join(f'`{value}`' for value in named)}. " if named else ""


def megatron_page() -> list[str]:
    """Returns the page of Megatron-LM's flags, and of what becomes of those of published scripts."""
    facts = parse_yaml(Path(__file__).with_name("megatron.yaml").read_text())
    lines = [
        "# Megatron-LM's flags",
        "",
        "[Coming from Megatron-LM](../from_megatron.md) has the defaults that differ.",
    ]
    for title, flags in zip(("Another name here", "None needed", "Not there"), foreign_flags().values(), strict=True):
        cell = "`{}`" if title == "Another name here" else "{}"
        rows = [f"| `{name}` | {cell.format(what)} |" for name, what in sorted(flags.items())]
        lines += ["", f"## {title}", "", "| flag | |", "|---|---|", *rows]
    lines += ["", "## The same name and meaning", "", ", ".join(f"`{name}`" for name in facts["same"]) + "."]
    for script, flags in facts["scripts"].items():
        lines += ["", f"## Flags of the script {script}", "", "| flag | value there | here |", "|---|---|---|"]
        for name, value in flags.items():
            here = facts["changed"][script].get(name) or what_it_is_here(name) or "kept"
            lines.append(f"| `{name}` | {'' if value is True else f'`{value}`'} | {here} |")
    return lines


def argument(action: argparse.Action) -> list[str]:
    """Returns an argument of a command as an entry of a list."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    entry = ", ".join(f"`{f'{name} {value}'.strip()}`" for name in action.option_strings or [""])
    text = re.sub(r"\s*\(default: (None|False|)\)|\s*tyro\.MISSING_NONPROP", "", action.help or "").strip()
    return [entry, f": {as_it_stands(' '.join(text.split()))}", ""] if text else [entry, ""]


def command_section(title: str, command: Commands, level: int) -> list[str]:
    """Returns what a command does and takes, or the commands below it."""
    lines = ["#" * level + f" {title}", ""]
    if not isinstance(command, type):
        group = command if isinstance(command, Group) else command()
        lines += [as_it_stands(group.text), ""]
        return lines + [
            line for name, one in group.commands.items() for line in command_section(f"{title} {name}", one, level + 1)
        ]
    with warnings.catch_warnings():  # tyro will have its parsers to itself one day
        warnings.simplefilter("ignore")
        parser = tyro.extras.get_parser(command, config=FORMS)
    lines += [
        line if line.startswith("    ") else as_it_stands(line) for line in (parser.description or "").splitlines()
    ] + [""]
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if shown and group.title not in ("positional arguments", "options"):
            lines += [f"*{str(group.title).capitalize()}*", ""]
        for action in shown:
            lines += argument(action)
    return lines


def commands_page() -> list[str]:
    """Returns the page of all commands, with what each takes."""
    rows = [f"| [`megatron-samoe {name}`](#megatron-samoe-{name}) | {what} |" for name, (_, what) in COMMANDS.items()]
    lines = ["# Commands", "", "| command | |", "|---|---|", *rows, ""]
    for name in COMMANDS:
        title = f"megatron-samoe {name}"
        if name == "pretrain":
            lines += [
                f"## {title}",
                "",
                "Trains a model. Its flags are the [options](options.md), which a YAML given by",
                "`--config` sets, too.",
                "",
            ]
        else:
            lines += command_section(title, completion.command_of(name), 2)
    return lines


def modules() -> list[str]:
    """Returns the names of the package's modules that have something public."""
    found = []
    for path in sorted((ROOT / "megatron_samoe").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "remote_code" in parts or parts[-1].startswith("__"):
            continue
        if parts[-2:] == ("vllm", "model"):  # it can be imported beside vLLM alone, whose classes it derives from
            continue
        body = ast.parse(path.read_text()).body
        if any(isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_") for n in body):
            found.append(".".join(parts))
    return found


def api_pages() -> None:
    """Writes a page for each package of modules, and their list."""
    rooms: dict[str, list[str]] = {}
    for name in modules():
        rooms.setdefault(".".join(name.split(".")[:2]), []).append(name)
    for room, names in rooms.items():
        lines = [f"# {room}", ""]
        for name in names:
            title = f"## {name.removeprefix('megatron_samoe.')}" if name != room else ""
            lines += [title, "", "```{eval-rst}", f".. automodule:: {name}", "```", ""]
        text(f"api/{room}.md", lines)
    text("api/index.md", ["# Classes and functions", "", "```{toctree}", *rooms, "```"])


def make_pages(app: Any) -> None:
    """Makes the pages that come from the code; with the tag `pages` not those of classes and functions, which take a minute."""
    text("options.md", options_page())
    text("commands.md", commands_page())
    text("megatron.md", megatron_page())
    if app.tags.has("pages"):
        text("api/index.md", ["# Classes and functions"])
    else:
        api_pages()


class Names(PythonDomain):
    """Names in signatures. Sphinx compares each with the end of every object's name; most, such as `int`, are the end of none."""

    def find_obj(self, env: Any, modname: str, classname: str, name: str, type: str | None, searchmode: int = 0) -> Any:
        """Returns the objects that a name may mean."""
        if len(self.objects) != getattr(self, "_counted", None):
            self._counted, self._ends = len(self.objects), {found.rpartition(".")[2] for found in self.objects}
        if name.removesuffix("()").rpartition(".")[2] not in self._ends:
            return []
        return super().find_obj(env, modname, classname, name, type, searchmode)


def mark_columns(app: Any, tree: Any, page: str) -> None:
    """Marks code that stands in columns, such as a printed table: it scrolls, where other code wraps. In the text it marks sentences,
    such as messages, which wrap, and short words, such as most options, which do not.
    """
    for block in tree.findall(nodes.literal_block):
        lines = [line for line in block.astext().splitlines() if "#" not in line]
        if sum(bool(re.search(r"\S {2,}\S", line)) for line in lines) >= max(2, len(lines) / 2):
            block["classes"].append("columns")
    for words in tree.findall(nodes.literal):
        blanks, length = words.astext().count(" "), len(words.astext())
        words["classes"] += ["sentence"] * (blanks > 3) + ["word"] * (blanks == 0 and length <= 24)


def mark_sentences(app: Any, tree: Any, page: str) -> None:
    """Marks tables of several columns of words. On a phone each cell is a line of its own, after its column's name."""
    for table in tree.findall(nodes.table):
        head, rows = ([[*row] for part in table.findall(kind) for row in part] for kind in (nodes.thead, nodes.tbody))
        lengths = [max(len(cell.astext()) for cell in column) for column in zip(*rows, strict=True)]
        if sum(length > 20 for length in lengths) < 2 and not (len(lengths) > 2 and max(lengths) > 50):
            continue
        table["classes"].append("sentences")
        for row in rows:
            for name, cell in zip(head[0], row, strict=True):
                if name.astext() and cell.children:
                    cell[0].insert(0, nodes.inline("", f"{name.astext()}: ", classes=["column"]))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_domain(Names, override=True)
    app.connect("doctree-resolved", mark_columns)
    app.connect("doctree-resolved", mark_sentences)
    app.connect("builder-inited", make_pages)
    app.connect("autodoc-process-docstring", read_as_text, priority=400)  # before the sections are read
    return {"parallel_read_safe": True, "parallel_write_safe": True}
