"""Every entry of every class, removed, null, set to something else, and there under two names: an import means what
transformers' own class makes of it, or refuses it by name.

At night more values are tried, and all configurations that are read are computed with.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.edited_model import validate_model
from megatron_samoe.convert.hf.families import Family, families
from megatron_samoe.convert.hf.families.entries import _EVERYWHERE, _UNREAD, completed
from megatron_samoe.convert.hf.families.reading import rope_of
from megatron_samoe.convert.hf.source import HFSource, derived_model
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import CheckpointError, ConfigError
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.parity.hf_models import their_logits, transformers
from tests.parity.test_hf_import import CASES, SIZES, made, random_ids
from tests.unit.convert.memory_source import logits

if not hasattr(transformers, "PreTrainedConfig"):
    pytest.skip("the tables are those of transformers 5", allow_module_level=True)
pytestmark = pytest.mark.parity

IN_FULL = pytest.mark.parametrize("in_full", first_by_day([False, True]))
FAMILY = {family.name: family for family in families() if family.name != "samoe"}
#: A model of each class, by its name among those of the other tests.
NAMES = {**{name: name for name in FAMILY}, "gpt_neox": "pythia"}
TABLE = table(__file__, tuples=False)
ROPES, VALUES, ROPE_KEYS = TABLE["ropes"], TABLE["values"], set(TABLE["rope keys"])


def base_of(name: str) -> dict[str, Any]:
    """Returns config.json of a small model as transformers writes it, and of which every entry is meant."""
    architecture, options = CASES[NAMES[name]]
    own = options if name == "gpt2" else {**SIZES, **options}
    return json.loads(getattr(transformers, f"{architecture}Config")(**own).to_json_string())


def variants(family: Family, all_values: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields an entry's name and a configuration in which it is changed."""
    base, draw = base_of(family.name), random.Random(family.name)
    names = transformers.CONFIG_MAPPING[family.name].attribute_map
    keys = [*base, *family.entries.table, *family.entries.unread, *_EVERYWHERE, *sorted(_UNREAD), *names, "surprise"]
    for key in dict.fromkeys(keys):
        if key == "model_type":
            continue
        yield key, {name: value for name, value in base.items() if name != key}
        few = 2 if family.entries.is_unread(key) else len(VALUES) if all_values else 6
        for value in (None, *draw.sample(VALUES, few)):
            if key == "num_labels" and value == 10**12:
                continue  # transformers makes a name for each
            yield key, {**base, key: value}
    for key, own in names.items():
        for one, other in ((base.get(own, 4), 2), (2, base.get(own, 4)), (None, 2), (2, None)):
            yield key, {**base, key: one, own: other}
            yield key, {own: other, key: one, **{k: v for k, v in base.items() if k not in (key, own)}}
    if "rope_parameters" not in base:
        return
    plain = {key: value for key, value in base.items() if key not in ROPE_KEYS}
    for rope in ROPES:
        for more in TABLE["next to ropes"]:
            yield "rope_parameters", {**plain, **more, "rope_parameters": rope}
            yield "rope_scaling", {"rope_scaling": rope, **plain, **more}
        for other in (*ROPES[:2], {}, None):
            yield "rope_scaling", {**plain, "rope_scaling": rope, "rope_parameters": other}
            yield "rope_scaling", {**plain, "rope_parameters": other, "rope_scaling": rope}


def resolved(name: str, config: dict[str, Any]) -> Any:
    """Returns transformers' configuration of a config.json, or what it raises."""
    try:
        theirs = transformers.CONFIG_MAPPING[name].from_dict(json.loads(json.dumps(config)))
        if "rope_parameters" in theirs.to_dict():
            theirs.standardize_rope_params()  # once more, as the model does
        return theirs
    except Exception as error:  # it raises several kinds
        return error


def their_windows(theirs: Any) -> list[int | None]:
    """Returns the window of each layer, by what the model classes read."""
    size, kind = getattr(theirs, "sliding_window", None), theirs.model_type
    if kind in ("qwen2", "qwen3", "qwen2_moe"):
        return [size if layer == "sliding_attention" else None for layer in theirs.layer_types]
    return [size if kind in ("mistral", "mixtral", "qwen3_moe") else None] * theirs.num_hidden_layers


def our_windows(native: NativeModel) -> list[int | None]:
    model = native.model
    every = model.window_attn_skip_freq
    return [None if every and (i + 1) % every == 0 else model.sliding_window for i in range(model.num_layers)]


def assert_same_entries(family: Family, ours: dict[str, Any], theirs: Any) -> None:
    if "rope_parameters" in ours:
        keys = ("rotary_emb_base", "rotary_pct") if family.name == "gpt_neox" else ()
        found = rope_of(ours, *keys)
        expected = {name: value for name, value in theirs.rope_parameters.items() if name != "type"}
        assert {name: found.get(name) for name in expected} == expected
        assert all(value in (None, 1.0, True) for name, value in found.items() if name not in expected)
    for name, value in ours.items():
        if (
            name not in family.entries.table
            or name in ROPE_KEYS
            or name in ("layer_types", "sliding_window")
            or not hasattr(theirs, name)
        ):
            continue
        expected = getattr(theirs, name)
        if name == "norm_topk_prob":
            expected = bool(expected)
        if name == "head_dim" and expected is None:
            expected = theirs.hidden_size // theirs.num_attention_heads
        if name == "n_inner" and expected is None:
            expected = 4 * theirs.n_embd
        assert value == expected, name


@IN_FULL
@pytest.mark.parametrize("name", FAMILY)
def test_what_is_read_is_what_transformers_resolves_or_is_refused_by_name(name: str, in_full: bool) -> None:
    family, num_read, num_refused = FAMILY[name], 0, 0
    for key, config in variants(family, in_full):
        others = {key, family.entries.own_name(key), *(ROPE_KEYS if key in ROPE_KEYS else ())}
        others |= {other for other, own in family.entries.other_names.items() if own == key}
        try:
            ours = completed(family.entries, config, name)
        except ConfigError as error:
            assert error.field.removeprefix("config.json: ") in others | {"num_hidden_layers"}, (key, error)
            num_refused += 1
            continue
        try:
            native = derived_model(family, config)
            validate_model(native.config)
        except ConfigError:
            num_refused += 1
            continue
        theirs = resolved(name, config)
        if isinstance(theirs, Exception) and family.entries.is_unread(key):
            continue
        if isinstance(
            theirs, Exception
        ):  # they want 1.0 for a number; heads that divide the hidden size, where none is needed
            what = f"{key} = {config.get(key)!r}"
            assert "expected float, got int" in str(theirs) or "not a multiple" in str(theirs), (what, theirs)
            continue
        try:
            assert_same_entries(family, ours, theirs)
            assert our_windows(native) == their_windows(theirs)
        except AssertionError as error:
            raise AssertionError(f"{key} = {config.get(key, 'removed')!r}, {config}") from error
        num_read += 1
    assert num_read > 50 and num_refused > 100, (num_read, num_refused)


def test_defaults_are_those_of_transformers() -> None:
    for name, family in FAMILY.items():
        given = {"num_experts_per_tok": 2} if name == "deepseek_v2" else {}  # it has none
        theirs = transformers.CONFIG_MAPPING[name](**given)
        assert_same_entries(family, completed(family.entries, given, name), theirs)


def test_every_other_name_of_transformers_is_known() -> None:
    for name, family in FAMILY.items():
        theirs = transformers.CONFIG_MAPPING[name].attribute_map
        unread = [
            other for other, own in theirs.items() if family.entries.is_unread(other) and family.entries.is_unread(own)
        ]
        turned = dict(theirs) if name != "qwen3_moe" else {own: other for other, own in theirs.items()}
        assert {o: n for o, n in turned.items() if o not in unread} == dict(family.entries.other_names), name


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns what gives the folder of a model, saved once for all tests."""

    @functools.cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        made(NAMES[name]).save_pretrained(folder)
        return folder

    return saved


@torch.no_grad()
def compared(folder: Path, config: dict[str, Any]) -> str:
    """Returns "refused" where we refuse a configuration of a folder's weights, "not built" where transformers cannot
    build it, else "same"; anything else is an error."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        source = HFSource(folder)
    except (ConfigError, CheckpointError):
        return "refused"
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    except TypeError:  # as with Mixtral's YaRN where head_dim is null
        return "not built"
    expected = their_logits(theirs, random_ids())
    ours = logits(source, tokens=random_ids()).view_as(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    return "same"


@IN_FULL
@pytest.mark.parametrize(
    "name", first_by_day(sorted(FAMILY, key=("deepseek_v3", "qwen3_moe", "llama").__contains__, reverse=True), 3)
)
def test_the_logits_of_changed_configurations_are_those_of_transformers(
    name: str, folder_of: Callable[[str], Path], in_full: bool
) -> None:
    family, folder, base = FAMILY[name], folder_of(name), base_of(name)
    unread: dict[str, Any] = {}
    for key in (
        *_UNREAD - {"model_type", "architectures", "auto_map", "return_dict", "dtype", "torch_dtype"},
        *family.entries.unread,
    ):
        legal = [v for v in (None, 1, "x", False) if not isinstance(resolved(name, {**base, key: v}), Exception)]
        if legal:
            unread[key] = legal[0]
    assert len(unread) > 70
    assert compared(folder, {**unread, **base}) == "same"
    different = {}
    plain = repr(derived_model(family, base).config.model) + repr(derived_model(family, base).config.moe)
    for _, config in variants(family, in_full):
        try:
            native = derived_model(family, config)
        except ConfigError:
            continue
        if not isinstance(resolved(name, config), Exception):
            different.setdefault(repr(native.config.model) + repr(native.config.moe), config)
    different.pop(plain, None)
    drawn = list(different.values())
    random.Random(name).shuffle(drawn)
    results = [compared(folder, config) for config in (drawn if in_full else drawn[:4])]
    assert drawn and set(results) <= {"same", "refused", "not built"}
