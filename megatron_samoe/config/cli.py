"""The configuration as flat Megatron flags and YAML files, through tyro.

Precedence, lowest first: defaults, the YAML file of --config, the checkpoint's configuration (with
--use-checkpoint-args), flags.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro

from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.typed import convert
from megatron_samoe.config.validate import idle_options, refuse_idle, without_idle_options
from megatron_samoe.errors import ConfigError, ConfigErrors, nearest
from megatron_samoe.parsing import parse_yaml, read_text

#: Groups, and single fields of other groups, that describe the model rather than a run of it.
CHECKPOINT_GROUPS = ("model", "moe")
CHECKPOINT_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")
_GROUPS = tuple(f.name for f in dataclasses.fields(PretrainConfig))


def parse_pretrain_args(
    argv: Sequence[str],
    read_checkpoint_config: Callable[[PretrainConfig], Mapping[str, Any] | None] | None = None,
    prog: str = "megatron-samoe pretrain",
    quiet: bool = False,
    accept_idle: bool = False,
) -> PretrainConfig:
    """Returns the configuration that a command line describes. A flag may take away what options of the file need, as
    `--expert-layout dense` those of experts: these are left out.

    Args:
        argv: arguments without the program's name.
        read_checkpoint_config: returns the saved configuration of the checkpoint that the command line names, or None
            where there is none; called only with --use-checkpoint-args.
        quiet: print no messages about wrong flags, because another rank does.
        accept_idle: accept options without effect, for who asks which they are.

    Raises:
        ConfigError: a YAML key is unknown or its value has the wrong type, or an option that is stated has no effect.
        SystemExit: a flag is unknown or malformed (the message went to standard error), or help was asked for.
    """
    args, yaml_path = _take_config_flag(list(argv))
    _refuse_foreign_names(args)
    base, in_args, in_file = PretrainConfig(), stated_in_args(args), frozenset[str]()
    if yaml_path is not None:
        mapping = read_yaml(yaml_path)
        base, in_file = apply_mapping(base, mapping, str(yaml_path)), stated_in_file(mapping)
    of_file, base = with_implied_layout(base, in_file), with_implied_layout(base, in_file | in_args)
    config = _parse_flags(args, base, prog, quiet)
    if config.checkpoint.use_checkpoint_args and read_checkpoint_config is not None:
        saved = read_checkpoint_config(config.with_run_dir())
        if saved is not None:
            base = apply_mapping(base, _model_part(saved), "the checkpoint's config.yaml")
            config = _parse_flags(args, base, prog, quiet)
    config = config.with_run_dir()
    if not accept_idle:
        # What a flag took from the file's options is no mistake of the file.
        of_itself = idle_options(of_file.with_run_dir(), in_file)
        refuse_idle(config, in_args | of_itself.keys())
        config = without_idle_options(config, vars(config), in_file - in_args)
    return config


def stated_in_args(args: Sequence[str]) -> frozenset[str]:
    """Returns the fields that flags name, those of booleans in either form."""
    names = {arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}
    return frozenset(names | {name.removeprefix("no_") for name in names})


def stated_in_file(mapping: Mapping[str, Any]) -> frozenset[str]:
    """Returns the fields that a YAML file names; none of a whole saved configuration, which holds every default."""
    if all(isinstance(mapping.get(group), Mapping) for group in _GROUPS):
        return frozenset()
    inner = [key for group in mapping.values() if isinstance(group, Mapping) for key in group]
    return frozenset(str(key).replace("-", "_").lstrip("_") for key in [*mapping, *inner])


def with_implied_layout(config: PretrainConfig, stated: Collection[str]) -> PretrainConfig:
    """Returns the configuration with experts of each layer's own where their number is stated and no layout is."""
    if "num_experts" not in stated or "expert_layout" in stated:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_layout="moe"))


def _refuse_foreign_names(args: Sequence[str]) -> None:
    """Raises ConfigErrors that say of flags of other programs what they are here."""
    ours = {flag(name) for _, name, *_ in all_options(PretrainConfig())}
    problems = []
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if name not in ours and (what := what_it_is_here(name)) is not None:
            problems.append(ConfigError(name, None, what))
    if problems:
        raise ConfigErrors(problems)


def _parse_flags(args: Sequence[str], base: PretrainConfig, prog: str, quiet: bool) -> PretrainConfig:
    return tyro.cli(
        PretrainConfig,
        args=args,
        default=base,
        console_outputs=not quiet,
        prog=prog,
        description="Pretrain a GPT whose MoE layers own their experts, or share one pool (SaMoE). "
        "--config FILE.yaml sets any of these options; flags override it.",
        config=(tyro.conf.OmitArgPrefixes,),
        registry=flag_forms(),
    )


def flag_forms() -> tyro.constructors.ConstructorRegistry:
    """Returns how tyro is to read options: one that is derived unless given as true or false is true when given bare, as
    Megatron's flags are.
    """
    registry = tyro.constructors.ConstructorRegistry()
    values = {"True": True, "False": False, "None": None}

    def read(words: list[str]) -> bool | None:
        if not words:
            return True
        if len(words) > 1 or words[0] not in values:
            raise ValueError(f"{' '.join(words)!r} is none of: nothing, which is True; {', '.join(values)}")
        return values[words[0]]

    @registry.primitive_rule
    def optional_flag(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[bool | None] | None:
        if not (get_origin(info.type) in (Union, types.UnionType) and set(get_args(info.type)) == {bool, type(None)}):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="[{True,False,None}]",
            instance_from_str=read,
            is_instance=lambda value: value is None or isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _take_config_flag(args: list[str]) -> tuple[list[str], Path | None]:
    path = None
    rest: list[str] = []
    while args:
        arg = args.pop(0)
        if arg == "--config":
            if not args:
                raise ConfigError("--config", None, "needs the path of a YAML file")
            path = Path(args.pop(0))
        elif arg.startswith("--config="):
            path = Path(arg.partition("=")[2])
        else:
            rest.append(arg)
    return rest, path


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Returns the mapping in a YAML file; ConfigError where it holds none."""
    try:
        content = parse_yaml(read_text(path))
    except OSError as error:
        raise ConfigError("--config", str(path), f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError("--config", str(path), "is not a text file in UTF-8") from None
    except ValueError as error:  # of the text, or of a path that no file can have
        raise ConfigError("--config", str(path), f"is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            "--config", str(path), f"must hold a mapping of option to value, not {type(content).__name__}"
        )
    return content


def to_mapping(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    """Returns the complete configuration as group -> field -> plain value, fit for YAML."""
    return {
        group: {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
        for group, fields in dataclasses.asdict(config).items()
    }


def from_mapping(mapping: Mapping[str, Any], source: str) -> PretrainConfig:
    """Returns the configuration of a mapping made by `to_mapping` or written by a user."""
    return apply_mapping(PretrainConfig(), mapping, source)


def apply_mapping(base: PretrainConfig, mapping: Mapping[str, Any], source: str) -> PretrainConfig:
    """Returns `base` with the options of a mapping; keys may stand flat or under their group's name.

    Args:
        source: name of the file for error messages.
    """
    groups = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    home = {f.name: g for g, value in groups.items() for f in dataclasses.fields(value)}
    changes: dict[str, dict[str, Any]] = {g: {} for g in groups}
    for key, value in mapping.items():
        name = str(key).replace("-", "_").lstrip("_")
        if name in groups and (isinstance(value, Mapping) or value is None):
            for sub_key, sub_value in (value or {}).items():
                sub_name = str(sub_key).replace("-", "_")
                if home.get(sub_name) != name:
                    own = [n for n, g in home.items() if g == name]
                    raise ConfigError(
                        f"{name}.{sub_key}", sub_value, f"unknown option in {source}.{nearest(sub_name, own)}"
                    )
                changes[name][sub_name] = sub_value
        elif name in groups and name not in home:
            raise ConfigError(str(key), value, f"is a group of options in {source}; it must hold a mapping")
        elif name in home:
            changes[home[name]][name] = value
        else:
            raise ConfigError(str(key), value, f"unknown option in {source}.{nearest(name, [*home, *groups])}")
    updated = {}
    for group, fields in ((group, fields) for group, fields in changes.items() if fields):
        hints = get_type_hints(type(groups[group]))
        checked = {name: convert(_form(name, value), hints[name], name, source) for name, value in fields.items()}
        updated[group] = dataclasses.replace(groups[group], **checked)
    return dataclasses.replace(base, **updated)


def _form(name: str, value: Any) -> Any:
    """Returns a value as its option has it: YAML reads a pattern of layers, whose own form is a text, as a list."""
    return str(value) if name == "moe_layer_freq" and isinstance(value, list) else value


def _model_part(saved: Mapping[str, Any]) -> dict[str, Any]:
    part = {group: saved.get(group) or {} for group in CHECKPOINT_GROUPS}
    part["data"] = {k: v for k, v in (saved.get("data") or {}).items() if k in CHECKPOINT_FIELDS}
    return part


@cache
def foreign_flags() -> Mapping[str, Mapping[str, str]]:
    """Returns flags with what is here in their place: `renamed` their names, `always_so` why they are not needed, `missing`
    what there is."""
    flags: Mapping[str, Mapping[str, str]] = parse_yaml(Path(__file__).with_name("foreign_flags.yaml").read_text())
    return flags


def what_it_is_here(name: str) -> str | None:
    """Returns what a flag of another program is here, for a message; None for one that is not known."""
    words = {
        "renamed": "is no option; this program's name for it is {}",
        "always_so": "is no option here; leave it out: {}",
        "missing": "is not there: {}",
    }
    found = (words[kind].format(flags[name]) for kind, flags in foreign_flags().items() if name in flags)
    return next(found, None)
