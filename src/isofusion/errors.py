"""The one exception a user's input can raise; the command line turns it into exit code 2 and one clear message.

And the words for what pydantic finds in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class InputError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do instead."""


class RunFailure(RuntimeError):
    """A run or a study could not finish (non-finite loss, full disk, dead worker): exit code 1."""


def explain(error: ValidationError, cls: type[BaseModel] | None = None, values: Any = None) -> str:
    """A pydantic error as one sentence: key, what is wrong, what was given. `values` is what was validated: a table of
    one of its lists is called by its name, as `--set` does.
    """
    parts = []
    for item in error.errors(include_url=False)[:3]:
        keys = _place(item["loc"], values)
        if item["type"] == "extra_forbidden":
            known = list(cls.model_fields) if cls is not None and len(keys) == 1 else []
            parts.append(unknown(".".join(keys), keys[-1], known))
        elif item["type"] == "missing":
            parts.append(f'"{".".join(keys)}" is missing')
        else:
            text = item["msg"].removeprefix("Value error, ")
            if item["type"] != "value_error":
                text = "write a list, [...]" if item["type"] in ("tuple_type", "list_type") else text
                text = f"{text[0].lower()}{text[1:]}, got {item['input']!r}"
            parts.append(": ".join(filter(None, [".".join(keys), text])))
    more = error.error_count() - 3
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _place(loc: Iterable[int | str], values: Any) -> list[str]:
    """sources.0.domain -> sources, figures, domain."""
    keys = []
    for part in loc:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            values = None
        name = values.get("name") if isinstance(part, int) and isinstance(values, dict) else None
        keys.append(name if isinstance(name, str) else str(part))
    return keys


def unknown(shown: str, key: str, known: Iterable[str]) -> str:
    """A key that does not exist, with the nearest one that does."""
    import difflib

    close = difflib.get_close_matches(key, list(known), n=1)
    return f'unknown key "{shown}"' + (f'; did you mean "{close[0]}"?' if close else "")
