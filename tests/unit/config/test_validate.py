"""Every rule of a configuration is broken once, and says so."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_samoe.config import PretrainConfig, derived
from megatron_samoe.config import validate as validation
from megatron_samoe.config.cli import from_mapping, read_yaml
from megatron_samoe.config.option import all_options
from megatron_samoe.config.rules import Rule, Table, layout, model, moe, run
from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError, ConfigErrors
from tests.harness.tables import table
from tests.harness.tiny import with_options

TABLE = table(__file__)

#: Modules of rules.
KINDS = (layout, model, moe, run)
ROOT = Path(__file__).resolve().parents[3]
SOURCES = "\n".join(path.read_text() for path in (ROOT / "megatron_samoe").rglob("*.py"))
EXAMPLES = {"megatron_samoe/cli/quickstart_data/config.yaml": 1, "examples/configs/samoe_tiny.yaml": 2}
VALID = with_options(PretrainConfig(), mock_data=True)
REFUSALS = yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text())


def row_of(options: dict[str, Any], world_size: int = 1) -> tuple[dict[str, Any], int]:
    """Returns a row's options, in which lists become tuples, and its number of ranks."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}, world_size


LEGAL = [row_of(*row) for row in REFUSALS.pop("legal")]
#: Options, world size, the flag that is named, a part of what is allowed.
BROKEN = [(*row_of(*row), flag, allowed) for flag, rows in REFUSALS.items() for allowed, *row in rows]


def errors_of(options: dict[str, Any], world_size: int) -> list[ConfigError]:
    try:
        validate(with_options(VALID, **options), world_size)
    except ConfigErrors as error:
        return error.errors
    return []


@pytest.mark.parametrize(("options", "world_size", "flag", "allowed"), BROKEN)
def test_broken_rule_names_flag_value_and_what_is_allowed(
    options: dict[str, Any], world_size: int, flag: str, allowed: str
) -> None:
    found = [error for error in errors_of(options, world_size) if error.field == flag]
    assert found, f"nothing is said about {flag}"
    assert any(allowed in error.allowed for error in found), [str(error) for error in found]
    field = flag[2:].replace("-", "_")
    if field in options:
        assert f"{flag} = {options[field]!r}: " in str(found[0])


def test_every_row_of_every_table_holds_in_a_case_above(monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[tuple[str, int]] = set()

    def noted(table: Table, config: PretrainConfig, world_size: int) -> Iterator[Rule]:
        rows: Any = table.rules(config, world_size)
        for row in rows:
            inner = rows
            while inner.gi_yieldfrom is not None:
                inner = inner.gi_yieldfrom
            if row.is_broken:
                held.add((inner.gi_frame.f_code.co_filename, inner.gi_frame.f_lineno))
            yield row

    tables = [table._replace(rules=partial(noted, table)) for table in validation.TABLES]
    monkeypatch.setattr(validation, "TABLES", tables)
    for options, world_size, _, _ in BROKEN:
        errors_of(options, world_size)
    rows = [
        (inspect.getfile(module), node)
        for module in KINDS
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Yield)
    ]
    assert len(rows) > 60
    silent = [
        f"{file}:{row.lineno}"
        for file, row in rows
        if not any((file, line) in held for line in range(row.lineno, (row.end_lineno or 0) + 1))
    ]
    assert not silent, f"no case reaches the rows at {silent}"


def test_what_only_cuda_does_is_advised_for_cuda() -> None:
    """Else a rule sends a user of a CPU to an option that is refused there. Which these are their refusals say."""
    bound = set(re.findall(r'ConfigError\(\s*"(--[\w-]+)", True, f?"needs (?:a )?CUDA', SOURCES))
    assert bound == {"--fp16", "--moe-hierarchical-all-to-all"}
    told = [error for options, world_size, _, _ in BROKEN for error in errors_of(options, world_size)]
    about = [e for e in told if e.field in bound or any(f"needs {flag}" in e.allowed for flag in bound)]
    silent = [str(error) for error in about if "CUDA" not in error.allowed and "excludes" not in error.allowed]
    assert about and not silent


DEFAULTS = {name: default for _, name, _, default, _ in all_options(PretrainConfig())}


def test_no_rule_advises_what_another_refuses() -> None:
    """An option is given what its refusal says that it needs, and is not sent elsewhere then."""
    followed = 0
    for options, world_size, flag, _ in BROKEN:
        for error in errors_of(options, world_size):
            advice = re.match(r"needs (--[\w-]+)(?: ([\w]+))?(?:[,;]| or | with |$)", error.allowed)
            name = "" if advice is None else advice[1][2:].replace("-", "_")
            if error.field != flag or advice is None or not (advice[2] or DEFAULTS[name] is False):
                continue
            for other in errors_of({**options, name: advice[2] or True}, world_size):
                assert other.allowed != error.allowed, str(other)
                assert other.field != advice[1] or "excludes" not in other.allowed, str(other)
            followed += 1
    assert followed > 20, followed


@pytest.mark.parametrize(("options", "world_size"), LEGAL)
def test_legal_configurations_pass(options: dict[str, Any], world_size: int) -> None:
    assert errors_of(options, world_size) == []


@pytest.mark.parametrize("path", EXAMPLES)
def test_small_examples_can_be_shortened(path: str) -> None:
    config = from_mapping(read_yaml(ROOT / path), path)
    validate(with_options(config, train_iters=5, data_path=("x",), tokenizer_model="x.model"), EXAMPLES[path])


def test_all_broken_rules_are_reported_together() -> None:
    with pytest.raises(ConfigErrors) as raised:
        validate(with_options(VALID, bf16=True, fp16=True, lr=-1.0, num_layers=0), 1)
    fields = [error.field for error in raised.value.errors]
    assert {"--fp16", "--lr", "--num-layers"} <= set(fields)
    assert len(str(raised.value).splitlines()) == 1 + len(fields)
    assert raised.value.exit_status == 2


def test_a_text_that_several_tables_read_is_refused_once_and_numbers_out_of_range_ask_no_more() -> None:
    problems = errors_of({"moe_layer_freq": "012", "expert_layout": "moe"}, 1)
    assert [error.field for error in problems] == ["--moe-layer-freq"]
    problems = errors_of({"tensor_model_parallel_size": 0, "context_parallel_size": 3, "fp16": True, "bf16": True}, 2)
    assert [error.field for error in problems] == ["--tensor-model-parallel-size", "--fp16"]


@pytest.mark.parametrize(("text", "num_layers", "expected"), TABLE["layer patterns"])
def test_moe_layer_freq(text: str, num_layers: int, expected: str) -> None:
    assert "".join(str(int(b)) for b in derived.parse_moe_layer_freq(text, num_layers)) == expected


@pytest.mark.parametrize("text", TABLE["wrong layer patterns"])
def test_wrong_moe_layer_freq_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--moe-layer-freq"):
        derived.parse_moe_layer_freq(text, 4)


@pytest.mark.parametrize(("text", "expected"), TABLE["stage layouts"])
def test_stage_layout(text: str, expected: tuple[int, ...]) -> None:
    assert derived.parse_stage_layout(text) == expected


@pytest.mark.parametrize("text", TABLE["wrong stage layouts"])
def test_wrong_stage_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-layout"):
        derived.parse_stage_layout(text)
