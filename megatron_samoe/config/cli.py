"""The configuration as flat Megatron flags and YAML files, through tyro.

Precedence, lowest first: defaults, the YAML file of --config, the checkpoint's configuration (with
--use-checkpoint-args), flags. `Asked` keeps who set each option.
"""

from __future__ import annotations

import dataclasses
import io
import types
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, make_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

import tyro

from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.schema import texts_of
from megatron_samoe.config.typed import convert, hints_of
from megatron_samoe.config.validate import refuse_idle, without_idle_options
from megatron_samoe.errors import ConfigError, ConfigErrors, UnknownFlagError, nearest
from megatron_samoe.parsing import parse_yaml, read_text
from megatron_samoe.plain_help import plain_help

#: Groups, and single fields of other groups, that describe the model rather than a run of it.
CHECKPOINT_GROUPS = ("model", "moe")
CHECKPOINT_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")
_GROUPS = tuple(f.name for f in dataclasses.fields(PretrainConfig))
#: Who can say an option, the last of whom counts; a flag is also what a caller in Python says.
OptionSource: TypeAlias = Literal["file", "checkpoint", "flag"]


@dataclass(frozen=True)
class Asked:
    """A configuration, and who said each of its options.

    Attributes:
        said: who, by option: the last of them counts. Other options have their defaults, or follow from what was said.
        replaced: options to which a flag or a checkpoint gave another value than they had below.
    """

    config: PretrainConfig
    said: Mapping[str, OptionSource]
    replaced: frozenset[str] = frozenset()

    @staticmethod
    def of(config: PretrainConfig | Mapping[str, Any]) -> Asked:
        """Returns what a caller in Python asks for: a configuration, or options by name as in a YAML file."""
        if isinstance(config, Mapping):
            return Asked(PretrainConfig(), {}).with_options(config, "the configuration")
        known = all_options(config)
        stated = [name for _, name, value, default, facts in known if value != default and facts.has_effect(config)]
        return Asked(config, dict.fromkeys(stated, "flag"))

    def with_options(self, options: Mapping[str, Any], written_in: str, source: OptionSource = "flag") -> Asked:
        """Returns it with options by name, as a YAML file has them.

        Args:
            written_in: where they are written, for error messages.
        """
        said = {**self.said, **dict.fromkeys(stated_in_mapping(options), source)}
        return self._with(apply_mapping(self.config, options, written_in), said, source)

    def with_flags(self, args: Sequence[str], prog: str, quiet: bool = False) -> Asked:
        """Returns it with the flags of a command line; see `parse`."""
        _refuse_unknown_names(args)
        said: dict[str, OptionSource] = {**self.said, **dict.fromkeys(stated_in_args(args), "flag")}
        return self._with(_parse_flags(args, self.config, prog, quiet), said, "flag")

    def with_checkpoint(self, saved: Mapping[str, Any]) -> Asked:
        """Returns it with the model of a checkpoint's configuration, except options that flags set."""
        part = {group: saved.get(group) or {} for group in CHECKPOINT_GROUPS}
        part["data"] = {k: v for k, v in (saved.get("data") or {}).items() if k in CHECKPOINT_FIELDS}
        flags = {name for name, source in self.said.items() if source == "flag"}
        part = {group: {n: v for n, v in options.items() if n not in flags} for group, options in part.items()}
        read = [name for options in part.values() for name in options]
        said: dict[str, OptionSource] = {**self.said, **dict.fromkeys(read, "checkpoint")}
        return self._with(apply_mapping(self.config, part, "the checkpoint's config.yaml"), said, "checkpoint")

    def as_file(self) -> Asked:
        """Returns it as what a file says, to which flags of a run are added."""
        return replace(self, said=dict.fromkeys(self.said, "file"))

    def _with(self, config: PretrainConfig, said: Mapping[str, OptionSource], source: OptionSource) -> Asked:
        """Returns it with what a source has said. A number of experts without a layout means experts of each layer's own."""
        pairs = zip(all_options(self.config), all_options(config), strict=True)
        changed = {name for (_, name, old, *_), (_, _, new, *_) in pairs if old != new}
        if "num_experts" in said and "expert_layout" not in said:
            config = replace(config, moe=replace(config.moe, expert_layout="moe"))
        return Asked(config, said, self.replaced | (frozenset() if source == "file" else changed))

    def settled(self) -> PretrainConfig:
        """Returns the configuration without those options of the file that have no effect because a flag or a checkpoint took
        away what they need, as `--expert-layout dense` does to those of experts.

        Raises:
            ConfigErrors: another option that somebody said has no effect.
        """
        config = self.config.with_run_dir()
        refuse_idle(config, self.said, self.replaced)
        of_file = [name for name, source in self.said.items() if source == "file"]
        return without_idle_options(config, _GROUPS, of_file)


def parse(argv: Sequence[str], prog: str = "megatron-samoe pretrain", quiet: bool = False) -> Asked:
    """Returns what a command line asks for.

    Args:
        argv: arguments without the program's name.
        quiet: print no messages about wrong flags, because another rank does.

    Raises:
        ConfigError: a YAML key is unknown or its value has the wrong type.
        SystemExit: a flag is unknown or malformed (the message went to standard error), or help was asked for.
    """
    args, yaml_path = _take_config_flag(list(argv))
    asked = Asked(PretrainConfig(), {})
    if yaml_path is not None:
        asked = asked.with_options(read_yaml(yaml_path), str(yaml_path), "file")
    return asked.with_flags(args, prog, quiet)


def parse_pretrain_args(argv: Sequence[str], prog: str = "megatron-samoe pretrain") -> PretrainConfig:
    """Returns the configuration that a command line describes, whatever a checkpoint says; see `parse` and `Asked.settled`."""
    return parse(argv, prog).settled()


def stated_in_args(args: Sequence[str]) -> frozenset[str]:
    """Returns the fields that flags name, those of booleans in either form."""
    names = {arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}
    return frozenset(names | {name.removeprefix("no_") for name in names})


def stated_in_mapping(mapping: Mapping[str, Any]) -> frozenset[str]:
    """Returns the fields that a YAML file names; none of a complete saved configuration, which holds every default."""
    if all(isinstance(mapping.get(group), Mapping) for group in _GROUPS):
        return frozenset()
    inner = [key for group in mapping.values() if isinstance(group, Mapping) for key in group]
    return frozenset(str(key).replace("-", "_").lstrip("_") for key in [*mapping, *inner])


def _refuse_unknown_names(args: Sequence[str]) -> None:
    """Raises ConfigErrors that say of flags that are not known which one is near, or what those of other programs are here."""
    ours = {flag(name): value for _, name, value, *_ in all_options(PretrainConfig())}
    switches = {f"--no-{name[2:]}" for name, value in ours.items() if value is None or isinstance(value, bool)}
    known = {*ours, *switches, "--config", "--help"}
    names = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    problems: list[ConfigError] = [
        UnknownFlagError(name, what_it_is_here(name) or f"is not known.{nearest(name, known)}")
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigErrors(problems, "several flags are not this program's:")


def _parse_flags(args: Sequence[str], base: PretrainConfig, prog: str, quiet: bool) -> PretrainConfig:
    read = partial(tyro.cli, prog=prog, registry=flag_forms())
    if {"-h", "--help"} & set(args):
        description = (
            "Pretrain a GPT whose MoE layers own their experts, or share one pool (SaMoE). "
            "--config FILE.yaml sets any of these options; flags override it."
        )
        if not quiet:
            forms = (tyro.conf.OmitArgPrefixes,)
            print(plain_help(partial(read, PretrainConfig, default=base, description=description, config=forms)))
        raise SystemExit(0)
    # tyro takes a fifth of a second for the types of all options, so it is given those that the words name.
    named = stated_in_args(args)
    options = [(group, name, value) for group, name, value, *_ in all_options(base) if name in named]
    hints = {group: hints_of(getattr(base, group).__class__) for group, *_ in options}
    texts = {group: texts_of(getattr(base, group).__class__) for group in hints}
    shown = "".join(f"\n    {name}: {' '.join(texts[group].get(name, '').split())}" for group, name, _ in options)
    kind = make_dataclass(
        "Flags",
        [(name, hints[group][name], value) for group, name, value in options],
        namespace={"__doc__": f"Options.\n\nAttributes:{shown}\n"},  # for tyro's words about a wrong value
    )
    # tyro shows some mistakes even without console outputs.
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        found = read(kind, args=args, console_outputs=not quiet)
    changed: dict[str, dict[str, Any]] = {group: {} for group in hints}
    for group, name, _ in options:
        changed[group][name] = getattr(found, name)
    return replace(base, **{group: replace(getattr(base, group), **values) for group, values in changed.items()})


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
            raise ValueError(f"{' '.join(words)!r} is not one of: nothing, which is True; {', '.join(values)}")
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
    """Returns `base` with the options of a mapping; keys may be flat or under their group's name.

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
        hints = hints_of(groups[group].__class__)
        checked = {name: convert(_form(name, value), hints[name], name, source) for name, value in fields.items()}
        updated[group] = replace(groups[group], **checked)
    return replace(base, **updated)


def _form(name: str, value: Any) -> Any:
    """Returns a value in its option's form: a list of layers where the option takes them as text."""
    if not isinstance(value, list) or name not in ("moe_layer_freq", "expert_sharing"):
        return value
    return str(value) if name == "moe_layer_freq" else ",".join(map(str, value))


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Returns options of a configuration as a command line has them."""
    switches = {name for _, name, _, default, _ in all_options(PretrainConfig()) if isinstance(default, bool)}
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool) and name in switches:
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


@cache
def foreign_flags() -> Mapping[str, Mapping[str, str]]:
    """Returns flags with their replacements here: `renamed` their names, `always_so` why they are not needed, `missing`
    what there is."""
    flags: Mapping[str, Mapping[str, str]] = parse_yaml(Path(__file__).with_name("foreign_flags.yaml").read_text())
    return flags


def what_it_is_here(name: str) -> str | None:
    """Returns what a flag of another program is here, for a message; None for one that is not known."""
    words = {
        "renamed": "is not an option; this program's name for it is {}",
        "always_so": "is not an option here; leave it out: {}",
        "missing": "is Megatron-LM's, and not supported here: {}",
    }
    found = (words[kind].format(flags[name]) for kind, flags in foreign_flags().items() if name in flags)
    return next(found, None)
