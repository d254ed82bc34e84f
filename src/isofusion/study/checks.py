"""Checks of user input that end in one clear InputError: unknown keys, wrong values, names that do not exist."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from isofusion.errors import InputError, explain, unknown

T = TypeVar("T", bound=BaseModel)


def make(cls: type[T], values: Mapping[str, Any], where: str, context: Any = None) -> T:
    """Validate, turning a pydantic error into one InputError that starts with `where`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: must be a table, got {values!r}")
    try:
        return cls.model_validate(dict(values), context=context)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, cls, values)}") from None


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Apply `a.b.c=value`; a table of a list is chosen by its name (`arms.early.sizes.s16.width=32`)."""
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise InputError(f"--set {text}: write key=value, e.g. --set train.lr=0.01")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, last = key.strip().split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = next((item for item in node if isinstance(item, dict) and item.get("name") == part), None)
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise InputError(f"--set {text}: nothing is called {part!r} there")
    if not isinstance(node, dict):
        raise InputError(f"--set {text}: {last!r} must be a key of a table")
    if parents[:1] in (["model"], ["train"]) or (*parents, last) == ("study", "budgets"):
        _refuse_hidden(tree, text, last)
    node[last] = value


def _refuse_hidden(tree: dict[str, Any], text: str, key: str) -> None:
    """A default that every size of every arm sets for itself would change nothing: say where to set it instead."""
    arms = [arm for arm in tree.get("arms", []) if isinstance(arm, dict) and isinstance(arm.get("sizes"), dict)]
    sizes = [(arm.get("name"), size, entry) for arm in arms for size, entry in arm["sizes"].items()]
    # a size with budgets = [] takes the study's
    if sizes and all(isinstance(entry, dict) and entry.get(key, []) != [] for _, _, entry in sizes):
        arm, size, _ = sizes[0]
        raise InputError(
            f"--set {text}: every size of every arm sets its own {key}, so this would change nothing; "
            f"set it there, e.g. --set arms.{arm}.sizes.{size}.{key}={text.partition('=')[2]}"
        )


def known_keys(table: Any, known: Iterable[str], where: str) -> None:
    """Raise InputError for a key outside `known`, with the nearest known one."""
    prefix, names = f"{where}: " if where else "", list(known)
    if not isinstance(table, dict):
        raise InputError(f"{prefix}must be a table, got {table!r}")
    for key in table:
        if key not in names:
            raise InputError(prefix + unknown(key, key, names))


def choice(name: str, known: list[str], where: str) -> None:
    """Raise InputError unless `name` is one of `known`."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known[:8])}"
        raise InputError(f'{where} "{name}" does not exist; {hint}')


def distinct(names: list[str], what: str) -> None:
    """Raise InputError if a name appears twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f'{what} name "{twice[0]}" appears more than once; names must differ')
