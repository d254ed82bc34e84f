"""The page of one fit: self-contained, every figure drawn, sentences in the runs' own numbers."""

from __future__ import annotations

import re
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofusion.laws.analysis import Analysis, analyse
from isofusion.laws.table import Runs
from isofusion.report import fitpage
from isofusion.report.fitfigures import FIGURES
from isofusion.report.style import NARROW, WIDE


def grid(sizes: int, budgets: int, *, equal: bool = False, alpha: float = 0.30) -> Runs:
    """Runs of a known law; `equal`: every size at the same few computes instead of the same tokens."""
    rng = np.random.default_rng(5)
    n, x = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 2e9, sizes), np.linspace(0, 1, budgets)))
    d = 10 ** (19 + 2 * x) / (6 * n) if equal else 10 ** (9.3 + 1.7 * x)
    loss = (1.9 + 260 / n**alpha + 1850 / d**0.335) * np.exp(0.002 * rng.standard_normal(len(n)))
    return Runs.of(n, d, loss, label="runs.csv")


@pytest.fixture(scope="module")
def full() -> Analysis:
    return analyse(grid(7, 5, equal=True), [1e21], draws=60, profiles=True)


@pytest.fixture(scope="module")
def page(full: Analysis, tmp_path_factory: pytest.TempPathFactory) -> str:
    return fitpage.write_page(full, tmp_path_factory.mktemp("page") / "fit.html").read_text(encoding="utf-8")


class Broken(Executor):
    """A pool whose process is killed before it has done anything."""

    def submit(self, *inputs: Any, **options: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor("killed"))
        return future


def test_a_pool_changes_no_number_and_a_broken_one_is_done_without(full: Analysis) -> None:
    runs, options = full.runs, {"draws": 60, "profiles": True}
    with ThreadPoolExecutor(1) as pool:
        assert analyse(runs, [1e21], pool=pool, **options).to_dict() == full.to_dict()
    assert analyse(runs, [1e21], pool=Broken(), **options).to_dict() == full.to_dict()


def test_one_file_with_every_figure(page: str) -> None:
    assert not re.search(r"<script|<link|src=|https?://", page)
    for name in FIGURES:
        assert f'id="{name}"' in page
    single = page.count('class="wide"')
    assert single == page.count('class="narrow"')
    assert single + page.count('class="panels') == len(FIGURES)
    assert "viewport" in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_the_answer_is_first_and_in_numbers(page: str, full: Analysis) -> None:
    top = page[: page.index("The numbers")]
    assert fitpage.si(full.answers[0]["n"]) in top
    assert "What these runs cannot say" in top
    assert "6ND" in top
    assert full.digest in page


def test_captions_speak_of_these_runs(full: Analysis) -> None:
    other = analyse(grid(6, 6, alpha=0.36), [1e21], draws=60, profiles=True)
    for name, (_, caption) in fitpage.CAPTIONS.items():
        if name == "isoflop":
            continue  # the second table has no budgets to speak of
        assert re.search(r"\d", caption(full))
        assert caption(full) != caption(other), name


def test_a_thin_table_gets_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    thin = analyse(grid(3, 3), draws=40, profiles=True)
    drawn = fitpage.draw(thin)
    assert "isoflop" not in drawn
    assert "loss-against-flops" in drawn
    text = fitpage.page(thin, drawn)
    assert "No isoFLOP analysis" in text
    assert "No hold-out" in text


def test_specifications_are_valid(full: Analysis) -> None:
    for name, make in FIGURES.items():
        for layout in (WIDE, NARROW):
            chart = make(full, layout)
            assert chart is not None, name
            chart.to_dict(validate=True)


def test_labels_keep_their_decimals() -> None:
    drawing = '<svg width="10" height="5"><path d="M1.23456,2"/><text>0.0001</text></svg>'
    shown = fitpage.render.inline(drawing, "x")
    assert "0.0001" in shown
    assert "M1.23," in shown
