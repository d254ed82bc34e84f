"""The page of one fit: self-contained, every figure drawn, sentences in the runs' own numbers."""

from __future__ import annotations

import re
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest
import vl_convert as vlc

from isofusion.laws.analysis import Analysis, analyse
from isofusion.laws.profile import Profile
from isofusion.laws.sensitivity import Sensitivity
from isofusion.laws.table import Runs
from isofusion.report import fitcaptions, fitfigures_tests, fitpage, fittables, style
from isofusion.report.fitfigures import FIGURES
from isofusion.report.fittables import nats, short
from isofusion.report.style import NARROW, WIDE
from isofusion.report.words import percent


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


def test_a_profile_without_one_end_says_the_other_as_every_interval_does(full: Analysis) -> None:
    closed = full.profiles["alpha"]
    assert isinstance(closed, Profile)
    one = replace(full, profiles={**full.profiles, "alpha": replace(closed, high=None)})
    assert f"[at least {short(closed.low)}]" in fittables.law(one)
    assert f"[at least {short(closed.low)}]" in fitcaptions.profiles_caption(one)


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


def wild(loss: float = 1.0, n: float | None = None) -> Analysis:
    """Twenty runs of a known law, one of them with a loss so many times too high, or another N."""
    runs = grid(5, 4)
    row = np.arange(len(runs)) == 7
    return analyse(Runs.of(np.where(row, n or runs.n, runs.n), runs.d, np.where(row, loss, 1.0) * runs.loss), draws=40)


def axes(chart: Any) -> dict[str, list[tuple[float, float]]]:
    """Ends of every axis of a figure, by x and y."""
    found: dict[str, list[tuple[float, float]]] = {"x": [], "y": []}

    def look(part: Any) -> None:
        if isinstance(part, list):
            for item in part:
                look(item)
        elif isinstance(part, dict):
            for name, ends in found.items():
                domain = part.get("encoding", {}).get(name, {}).get("scale", {}).get("domain")
                if domain:
                    ends.append((domain[0], domain[1]))
            for item in part.values():
                look(item)

    look(chart.to_dict(validate=False))
    return found


@pytest.mark.parametrize("kind", [{"loss": 3e5}, {"n": 1.0}])
def test_one_wild_run_does_not_squash_the_others(kind: dict[str, float]) -> None:
    a = wild(**kind)
    ordinary = np.arange(len(a.runs)) != 7
    losses, sizes = a.runs.loss[ordinary], a.runs.n[ordinary]
    found = axes(FIGURES["loss-against-flops"](a, WIDE))
    for low, high in found["y"]:
        assert high < 1.5 * losses.max()
        assert low < losses.min()
    for low, _ in found["x"]:
        assert low > 0.5 * a.runs.c[ordinary].min()
    for low, high in axes(FIGURES["residuals"](a, WIDE))["y"]:
        assert high - low < 300  # per cent of the loss
    for low, _ in axes(FIGURES["residuals"](a, WIDE))["x"][:1]:
        assert low > 0.5 * sizes.min()
    for low, high in axes(FIGURES["choices"](a, WIDE))["x"]:
        assert high / low < 2e6
    told = fitpage.CAPTIONS["loss-against-flops"][1](a)
    assert "One run lies too far from the others to be drawn: loss" in told


def test_ordinary_runs_are_all_drawn(full: Analysis) -> None:
    for name in ("loss-against-flops", "compute-optimal", "residuals", "hold-out", "isoflop"):
        told = fitpage.CAPTIONS[name][1](full)
        assert "too far" not in told
        assert "Outside the axes" not in told


def test_a_figure_that_fails_is_a_sentence_on_the_page(full: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise ZeroDivisionError("no <width> left\nsecond line")

    monkeypatch.setitem(FIGURES, "residuals", broken)
    monkeypatch.setitem(fitpage.TABLES, "hold-out", broken)
    monkeypatch.setitem(fitpage.CAPTIONS, "profiles", ("Profiles", broken))
    text = fitpage.page(full, fitpage.draw(full))
    for what in ("figure", "table", "caption"):
        assert f"This {what} could not be drawn up: no " in text
    assert "&lt;width&gt; left (ZeroDivisionError)" in text
    assert 'id="cloud"' in text


def test_a_drawing_that_fails_is_a_sentence_too(full: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: Any) -> str:
        raise ValueError("no font")

    monkeypatch.setattr(fitpage.render, "svg", broken)
    drawn = fitpage.draw(full)
    assert set(drawn) == set(FIGURES)
    assert all("no font (ValueError)" in d.html("x") for d in drawn.values())


def test_numbers_are_given_to_the_digits_they_have() -> None:
    assert [short(v) for v in (59.04, 1238.0, 99_999.0, 2.53e-62, 1.78e88, 0.0)] == [
        "59", "1240", "100000", "2.53·10⁻⁶²", "1.78·10⁸⁸", "0",
    ]  # fmt: skip
    assert short(0.31848, 5) == "0.31848"
    assert [nats(v, 4) for v in (2.59352, 15.4253, 7.8e-7, 1.05e6)] == ["2.5935", "15.4253", "7.80·10⁻⁷", "1.05·10⁶"]
    assert [percent(v) for v in (0.104, 71530.759, 0.00001)] == ["10.4 %", "7.2·10⁶ %", "< 0.1 %"]


def test_no_number_of_a_wild_run_fills_the_page() -> None:
    a = wild(loss=3e5)
    words = re.sub(r"<[^>]*>", " ", fitpage.page(a, {}))
    assert not re.search(r"\de[+-]\d", words.partition("How it was found")[0])
    assert not re.search(r"(?<![.\d])\d{8}", words.partition("Made by isofusion")[0])


def test_labels_keep_their_decimals() -> None:
    drawing = '<svg width="10" height="5"><path d="M1.23456,2"/><text>0.0001</text></svg>'
    shown = fitpage.render.inline(drawing, "x")
    assert "0.0001" in shown
    assert "M1.23," in shown


def test_what_rounds_to_ten_is_the_next_power() -> None:
    """Budgets of a table are seldom round: 9.99e17 was 10·10¹⁷ in a legend."""
    values = [9.99e17, 1e18, 3e18, 9.94e18, 9.96e19]
    axis = alt.Axis(values=values, labelExpr=style._power_label(), labelOverlap=False)
    x = alt.X("c:Q", scale=alt.Scale(type="log", domain=[5e17, 2e20]), axis=axis)
    chart = alt.Chart(alt.Data(values=[{"c": v} for v in values])).mark_point().encode(x=x)
    drawn = vlc.vegalite_to_svg(chart.properties(width=2000).to_dict())
    assert re.findall(r">([^<>]*10[⁰¹²³⁴-⁹]+)<", drawn) == ["10¹⁸", "10¹⁸", "3·10¹⁸", "9.9·10¹⁸", "10²⁰"]


def test_a_baseline_that_predicts_nothing_is_not_in_the_legend(full: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Carry-over needs another size at the same tokens; tables of isoFLOPs seldom have one."""
    rows = [row for row in fitfigures_tests.step_errors(full) if row["kind"] != "carry over"]
    monkeypatch.setattr(fitfigures_tests, "step_errors", lambda a: rows)
    steps = fitfigures_tests.hold_out(full, WIDE).to_dict()["concat"][1]
    assert steps["layer"][0]["encoding"]["color"]["scale"]["domain"] == ["law", "k·Cᶜ", "nearest run"]


def test_a_choice_without_a_number_is_told_below_its_table() -> None:
    thin = analyse(grid(3, 3), draws=40)
    assert isinstance(thin.sensitivity, Sensitivity)
    shown = fitpage.TABLES["choices"](thin)
    body, _, below = shown.partition("</table>")
    for reason, names in thin.sensitivity.without.items():
        assert names
        assert fitpage.pretty(reason) in below
    assert "isoFLOP parabolas" not in body
    assert "isoFLOP parabolas: runs.csv: no compute budget" in below
    assert body.count("<tr>") == 1 + sum(1 for r in thin.sensitivity.shown() if r.counts or r.misfit >= 0)
