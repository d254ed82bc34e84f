"""What every test of the command line starts from."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_width_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist sets COLUMNS for its workers; output is as wide as it is without."""
    monkeypatch.delenv("COLUMNS", raising=False)
