"""The one exception a user's input can raise; the command line turns it into exit code 2 and one clear message."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do instead."""


class RunFailure(RuntimeError):
    """A run or a study could not finish (non-finite loss, full disk, dead worker): exit code 1."""
