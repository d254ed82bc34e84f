"""What is said while data is read goes through the logger `isofusion.data`: how far work is that takes long.

The command line shows these lines on stderr (cli/main.py). Workers and libraries do not: there they go nowhere.
"""

from __future__ import annotations

import logging
import time

FIRST = 2.0  # seconds of work before the first line
EVERY = 15.0  # between lines
log = logging.getLogger("isofusion.data")


class Slow:
    """One piece of work. `at` is cheap enough to be called for every sample."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._next = time.monotonic() + FIRST

    def at(self, how_far: str, *values: object) -> None:
        """`how_far` as for str.format, which is only called where a line is due."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + EVERY
            log.info("%s: %s", self.what, how_far.format(*values))
