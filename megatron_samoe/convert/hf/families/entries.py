"""The entries that a class reads from config.json: a table, and the one function that completes a file by it.

transformers fills a configuration in when it loads one: defaults of the class, values that follow from others, older
names, names that count twice. A reader of ours gets all of it resolved. An entry that no table knows is refused, since
nobody can say that it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_samoe.errors import ConfigError, nearest, readable
from megatron_samoe.parsing import finite_float, parse_yaml

CannotCompute = "megatron_samoe's model cannot compute it"


def wrong_entry(name: str, value: Any, why: str) -> ConfigError:
    """Returns the error of an entry of config.json."""
    return ConfigError(f"config.json: {name}", value, why)


_MISSING, _NEEDED = object(), object()
_MOST_LAYERS = 10_000
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    (list, str): "a list of texts",
    (list, int): "a list of whole numbers",
}


@dataclass(frozen=True)
class Entry:
    """An entry of config.json.

    Attributes:
        kind: of its value: a type, a pair of list and the type of its elements, or object for any value.
        missing: its value where it is not there; with none of these, the completed configuration lacks it too.
        takes_null: whether null has a meaning of its own. It stays null where nothing follows from other entries.
        allowed: the only values that our model computes, if there are any.
        why: completes the message of a value that is not allowed.
    """

    kind: Any
    missing: Any = _MISSING
    takes_null: bool = False
    allowed: tuple[Any, ...] = ()
    why: str = ""

    def refuse_wrong(self, name: str, value: Any) -> None:
        """Raises ConfigError where the entry has a value that it cannot have, or that our model does not compute."""
        if self.allowed:
            if not any(value == legal and type(value) is type(legal) for legal in self.allowed):
                legal = " or ".join("null" if value is None else repr(value) for value in self.allowed)
                raise wrong_entry(name, value, self.why or f"{CannotCompute}; it must be {legal}")
        elif not (self.takes_null if value is None else _is_of(value, self.kind)):
            or_null = " or null" if self.takes_null else ""
            raise wrong_entry(name, value, f"must be {_WORDS[self.kind]}{or_null}")


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(_is_of(element, kind[1]) for element in value)
    if kind is float:
        return not isinstance(value, str) and finite_float(value) is not None
    return kind is object or (type(value) is kind and (kind is not int or abs(value) < 2**31))


def may(kind: Any, missing: Any = None) -> Entry:
    """Returns an entry that can be null."""
    return Entry(kind, missing, takes_null=True)


def rare(kind: Any, takes_null: bool = False) -> Entry:
    """Returns an entry that has no default."""
    return Entry(kind, takes_null=takes_null)


def only(*allowed: Any, why: str = "") -> Entry:
    """Returns an entry of which our model computes a few values; the first is the default."""
    return Entry(object, allowed[0], None in allowed, allowed, why)


def one_of(*allowed: Any) -> Entry:
    """Returns an entry that must be there and has a few values."""
    return Entry(object, _NEEDED, allowed=allowed)


def needed(kind: Any) -> Entry:
    """Returns an entry that must be there."""
    return Entry(kind, _NEEDED)


def never(why: str) -> Entry:
    """Returns an entry that may not be there."""
    return Entry(object, allowed=(_MISSING,), why=why)


@dataclass(frozen=True)
class Entries:
    """The entries of a class that decide what it computes.

    Attributes:
        table: each entry by its name; a plain value is the default of one that must be of its type.
        other_names: further names of entries. One that is there goes before the entry's own name.
        unread: further entries which files of this class hold, and which change nothing.
    """

    table: Mapping[str, Any]
    other_names: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def entry(self, name: str) -> Entry | None:
        """Returns an entry by its own name; None where its meaning is not known."""
        given = self.table[name] if name in self.table else _EVERYWHERE.get(name)
        return given if given is None or isinstance(given, Entry) else Entry(type(given), given)

    def own_name(self, key: str) -> str:
        """Returns the entry's own name for any of its names."""
        return self.other_names.get(key, key)

    def is_unread(self, key: str) -> bool:
        """Returns whether an entry changes nothing."""
        return key not in self.table and (key in _UNREAD or key in self.unread)


_KINDS = {kind.__name__: kind for kind in (bool, int, float, str, dict)}


def _kind(words: Any) -> Any:
    return (list, _KINDS[words[0]]) if isinstance(words, list) else _KINDS[words]


def _entry(line: Any) -> Any:
    """Returns an entry of `entries.yaml`, or the default of one."""
    match line:
        case {"may": kind}:
            return may(_kind(kind), line.get("missing"))
        case {"rare": kind}:
            return rare(_kind(kind))
        case {"needed": kind}:
            return needed(_kind(kind))
        case {"only": values}:
            return only(*values, why=line.get("why", ""))
        case {"never": why}:
            return never(why)
    return line


_FILE: Mapping[str, Any] = parse_yaml(Path(__file__).with_name("entries.yaml").read_text())
_EVERYWHERE = {name: _entry(line) for name, line in _FILE["everywhere"].items()}
_UNREAD = frozenset(_FILE["unread"])
#: Names of entries of our own class.
OWN_CLASS: Mapping[str, Any] = _FILE["own class"]


def entries_of(model_type: str) -> Entries:
    """Returns the entries of a class that `entries.yaml` has."""
    said = _FILE["families"][model_type]
    table = {name: _entry(line) for name, line in said["entries"].items()}
    return Entries(table, said.get("other_names", {}), tuple(said.get("unread", ())))


def completed(entries: Entries, config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns all entries that decide what a class computes, by their own names, with the values that transformers gives
    them. Those of rotary positions stay as they are given: `reading.rope_of` resolves them.

    Raises:
        ConfigError: an entry has a value that it cannot have or that our model does not compute, or nothing is known of it.
    """
    found = {
        name: entry.missing
        for name in entries.table
        if (entry := entries.entry(name)) is not None and entry.missing is not _MISSING
    }
    # In the order in which they count: other names come last.
    for key in sorted(config, key=lambda key: key in entries.other_names):
        if entries.is_unread(key):
            continue
        name = entries.own_name(key)
        entry = entries.entry(name)
        if entry is None:
            if config[key] is None or config[key] is False:
                continue  # the class lacks what is switched off here
            raise wrong_entry(
                readable(key),
                config[key],
                f"is not an entry whose meaning for {family} is known; remove it if it "
                f"changes nothing that the model computes.{nearest(readable(key), entries.table)}",
            )
        entry.refuse_wrong(key, config[key])
        found[name] = config[key]
    lacking = [name for name, value in found.items() if value is _NEEDED]
    if lacking:
        raise wrong_entry(lacking[0], None, f"is missing, and {family} needs it")
    return _fill_nulls(found)


def _fill_nulls(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries, in which a null has become what transformers computes from the others; refuses sizes that are not positive."""
    heads = found.get("num_attention_heads")
    if heads is not None and heads < 1:
        raise wrong_entry("num_attention_heads", heads, "must be positive")
    layers = found.get("num_hidden_layers", found.get("n_layer", 1))
    if not 1 <= layers <= _MOST_LAYERS:  # before anything is listed by layer
        raise wrong_entry("num_hidden_layers", layers, f"must be between 1 and {_MOST_LAYERS:,}")
    if "num_key_value_heads" in found and found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = heads
    if found.get("head_dim", 0) is None:
        found["head_dim"] = found["hidden_size"] // heads
    if found.get("mlp_only_layers", 0) is None:
        found["mlp_only_layers"] = []
    if found.get("n_inner", 0) is None:
        found["n_inner"] = 4 * found["n_embd"]
    if found.get("norm_topk_prob", 0) is None:
        found["norm_topk_prob"] = False
    return found
