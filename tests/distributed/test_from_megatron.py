"""docs/from_megatron.md says what is so: names, defaults, and two published scripts, which train here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.config.cli import foreign_flags, parse, parse_pretrain_args, what_it_is_here
from megatron_samoe.config.derived import flag
from megatron_samoe.config.option import all_options
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.parsing import parse_yaml
from tests.harness.program import REPOSITORY, losses, start

pytestmark = pytest.mark.distributed
FACTS = parse_yaml((REPOSITORY / "docs/megatron.yaml").read_text())
PAGE = (REPOSITORY / "docs/from_megatron.md").read_text()
OURS = {flag(name): (group, name) for group, name, *_ in all_options(PretrainConfig())}
#: Ranks of a script's own layout; sizes that two processor cores train, and the layout's kind at that size.
RANKS = {"mixtral_8x7b": 32, "deepseek_v3": 512}
SMALL = "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16 --moe-ffn-hidden-size 16"
LAYOUT = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 4 --num-threads 1"
RUN = "--mock-data --tokenizer-type ByteTokenizer --make-vocab-size-divisible-by 8 --eval-iters 1 --lr-warmup-iters 1"
SMALLER = {
    "mixtral_8x7b": "--num-query-groups 2 --train-iters 2 --lr-decay-iters 2",
    "deepseek_v3": "--q-lora-rank 16 --kv-lora-rank 8 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --num-experts 16 "
    "--moe-layer-freq ([0]*1+[1]*3) --moe-shared-expert-intermediate-size 16 --pipeline-model-parallel-layout Ett|ttL "
    "--rope-original-max-positions 16 --train-samples 8 --lr-decay-samples 8 --lr-warmup-samples 4",
}


def option(config: PretrainConfig, name: str) -> Any:
    group, field = OURS[name]
    return getattr(getattr(config, group), field)


def translated(script: str, *more: str) -> PretrainConfig:
    return parse_pretrain_args(["--config", str(REPOSITORY / f"examples/from_megatron/{script}.yaml"), *more])


def test_names_are_one_thing_each() -> None:
    same = set(FACTS["same"])
    assert len(same) > 100 and same <= OURS.keys()
    assert not any(same & set(flags) for flags in foreign_flags().values())


def test_the_table_of_defaults_is_true() -> None:
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \| (.*?) \|$", PAGE.split("## Two scripts")[0], re.MULTILINE)
    listed: dict[str, tuple[str, str]] = {}
    for names, there, here in rows:
        flags = re.findall(r"`(--[a-z0-9-]+)`", names)
        values = [(text.split(", ") * len(flags))[: len(flags)] for text in (there, here)]
        listed |= dict(zip(flags, zip(*values, strict=True), strict=True))
    derived = {"--moe-ffn-hidden-size"}  # whose default is words
    assert listed.keys() == FACTS["defaults"].keys() | derived
    words = {"none": None, "no": False, "yes": True, "2^32": 2**32, "2^16": 2**16}
    for name, there in FACTS["defaults"].items():
        written = [words.get(text, text) for text in listed[name]]
        default = option(PretrainConfig(), name)
        for text, value in zip(written, (there, default), strict=True):
            assert text == value or float(text) == value, name
        assert default != there, f"{name} does not differ"


@pytest.mark.parametrize("script", FACTS["scripts"])
def test_each_flag_of_a_script_is_kept_renamed_or_refused(script: str) -> None:
    config = translated(script, "--tokenizer-model", "x", "--data-path", "x", "--save", "x")
    validate(config, RANKS[script])
    asked = {"--no-load-optim", "--no-load-rng"}  # of a run that begins from a checkpoint
    flags, changed = FACTS["scripts"][script], FACTS["changed"][script]
    for name in changed:
        assert any(f"| `{name}` |" in line and changed[name] in line for line in PAGE.splitlines()), name
    others = flags.keys() - OURS.keys()
    assert all(map(what_it_is_here, others))
    kept = [name for name in flags if flags[name] != "x" and name not in others | asked | changed.keys()]
    words = [name if flags[name] is True else f"{name}={flags[name]}" for name in kept]
    given = parse(words).config
    assert len(kept) > 30 and {name: option(config, name) for name in kept} == {
        name: option(given, name) for name in kept
    }


@pytest.mark.parametrize("script", FACTS["scripts"])
def test_a_translated_script_trains(script: str, tmp_path: Path) -> None:
    own = SMALLER[script]
    words = f"{SMALL} {LAYOUT} {RUN.replace('--lr-warmup-iters 1', '') if 'samples' in own else RUN} {own}".split()
    config = ["--config", str(REPOSITORY / f"examples/from_megatron/{script}.yaml"), "--run-dir", str(tmp_path / "run")]
    start([*config, *words], tmp_path / "out", num_ranks=4).succeed()
    assert len(losses(tmp_path / "run/metrics.jsonl")) == 2
