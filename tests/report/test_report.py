"""The page from planted laws: self-contained, every figure there, sentences that hold the analysis' own numbers."""

from __future__ import annotations

import copy
import html
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.doubt import law_warnings
from isofusion.report import advice, evidence, render, tables, tables_evidence, text, words
from isofusion.report.analysis import analyse
from isofusion.report.figures import NAMES, compute_optimal
from isofusion.report.lawside import fit_arm, frontier
from isofusion.report.methods import methods, read_json
from isofusion.report.page import DRAW, build_report
from isofusion.report.page import page as compose
from isofusion.report.style import NARROW, WIDE, arm_styles, log_ticks, themed

STUDY = {"name": "planted", "world": False, "seeds": [0], "description": "", "assumed": "", "compute_label": "C"}


@pytest.fixture(scope="session")
def built(planted: Any) -> tuple[Path, dict[str, Any], str]:
    out, rows = planted
    path = build_report(out, rows)
    return out, json.loads((out / "analysis.json").read_text()), path.read_text()


def undrawn(a: dict[str, Any]) -> str:
    """The page without its drawings; every chart is built, none is rendered."""
    for draw in DRAW.values():
        draw(a, WIDE)
        draw(a, NARROW)
    return compose(a, {}, [])


def test_page_is_self_contained(built: Any) -> None:
    _, _, page = built
    assert not re.search(r'(src|href)\s*=\s*"(?!#)', page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(http" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert len(page) < 3_000_000
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def test_every_figure_is_drawn_wide_and_narrow_and_saved(built: Any) -> None:
    out, _, page = built
    assert set(DRAW) == set(text.CAPTIONS)
    for name in DRAW:
        assert (out / "figures" / f"{name}.svg").read_text().startswith("<svg")
        assert (out / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f'id="{name}"' in page
    assert page.count('<div class="wide"><svg') == page.count('<div class="narrow"><svg') == len(DRAW)


def test_specifications_are_valid_vega_lite(built: Any) -> None:
    _, a, _ = built
    for draw in (DRAW["image-use"], DRAW["tokens-per-expert"], DRAW["loss-by-class"]):
        for layout in (WIDE, NARROW):
            draw(a, layout).to_dict()  # raises SchemaValidationError
            assert themed(draw(a, layout), layout)["config"]["background"] == "#ffffff"


def test_the_answer_is_the_planted_best_arm(built: Any) -> None:
    _, a, page = built
    ref = a["answer"]["ref"]
    assert ref["best"] == "early-moe"
    assert [r["arm"] for r in ref["arms"]][-1] == "late"
    assert "What this study cannot say" in page
    best = ref["arms"][0]
    head = " ".join(text.headline(a))
    assert f"N = {words.si(best['n'])} {words.interval(best['n_interval'], how=words.si)}" in head
    assert words.fixed(best["loss"]) in head
    assert page.index("The answer") < page.index("What this study cannot say") < page.index("The numbers")


def test_fits_recover_the_planted_laws(built: Any) -> None:
    _, a, _ = built
    fit = a["fits"]["early"]["caption"]
    assert fit["alpha"] == pytest.approx(0.42, abs=0.05)
    assert fit["beta"] == pytest.approx(0.50, abs=0.03)
    assert fit["a"] == pytest.approx(fit["beta"] / (fit["alpha"] + fit["beta"]))
    low, high = fit["interval"]["alpha"]
    assert low < fit["alpha"] < high
    assert fit["power"]["c"] < 0
    held = a["holdout"]["early"]["caption"]
    assert held["error_reducible"] < 0.05
    assert held["beats_carry"]
    assert held["oracle_e"]["error_reducible"] < 0.05  # the planted floor is 0.03 above the oracle
    assert held["oracle_e"]["error_reducible"] != held["error_reducible"]


def test_captions_hold_the_numbers_of_the_analysis(built: Any) -> None:
    _, a, page = built
    pair = next(p for p in a["differences"] if p["label"] == "early − late")
    at = pair["at_ref"]["mean"]
    assert at["verdict"] == "lower"
    assert f"{words.fixed(at['diff'], sign=True)} {words.interval((at['lo'], at['hi']))}" in text.differences(a)
    shown = a["image_use"][0]["d_shuffled"]
    assert words.fixed(shown["t"], 1) in text.image_use(a)
    pooled = text.pooled_fusion(a, "early")
    assert pooled is not None
    assert words.fixed(pooled["loss"]) in text.loss_by_class(a)
    assert pooled["log_m"] == pytest.approx(math.log(4))
    assert f"early {words.fixed(pooled['loss'])}, below chance (standard error" in text.loss_by_class(a)
    assert f"blind {words.fixed(pooled['blind'])}, not clearly below chance (" in text.loss_by_class(a)
    for _, caption in text.CAPTIONS.values():
        assert re.search(r"\d\.\d", caption(a))
        assert "None" not in caption(a)
        assert "nan" not in caption(a)
    assert ">None<" not in page


def test_fusion_is_compared_on_the_same_documents(built: Any, planted: Any, tmp_path: Path) -> None:
    _, a, page = built
    by_class = {
        r["class"]: r["documents"] for r in a["fusion_compare"] if (r["first"], r["second"]) == ("early", "late")
    }
    assert set(by_class) == {f"{d}/fusion-{when}" for d in ("caption", "interleaved") for when in ("after", "before")}
    for name, d in by_class.items():
        planted_difference = -0.05 if "before" in name else 0.0
        assert (d["size"], d["steps"], d["seeds"]) == (a["study"]["sizes"][-1], 900, 1)
        assert abs(d["diff"] - planted_difference) < 4 * d["se"] < 0.02  # the documents' own spread of 0.5 is gone
        assert 200 < d["docs"] < 400  # those that ask
        assert words.fixed(d["diff"], sign=True) in text.loss_by_class(a)
    assert abs(by_class["caption/fusion-before"]["t"]) > 10
    assert "by document" in page

    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    for row in rows:
        path = evidence.eval_path(tmp_path / "s", row).with_name("eval_docs.npz")
        with np.load(path) as docs:
            arrays = dict(docs)
        if row["arm"] == "late":  # other documents: no pairing
            arrays["caption/fusion-before_targets"] = arrays["caption/fusion-before_targets"][::-1]
            np.savez(path, **arrays)
    other = evidence.fusion_compare(tmp_path / "s", rows, [("early", "late")], {r["n"]: r["size"] for r in rows})
    assert {r["class"]: r["documents"] is None for r in other} == {
        name: name == "caption/fusion-before" for name in by_class
    }


@pytest.mark.parametrize("dash", [[5, 3], [1, 0]])
@pytest.mark.parametrize("points", [[1], [1, 1, 1], [1, 2]])
def test_a_line_of_one_point_is_painted_without_a_complaint(points: list[int], dash: list[int], caplog) -> None:
    spec = {
        "data": {"values": [{"x": p, "y": p} for p in points]},
        "layer": [{"mark": {"type": "line", "strokeDash": dash}}, {"mark": "point"}],
        "encoding": {axis: {"field": axis, "type": "quantitative"} for axis in ("x", "y")},
    }
    drawing = render.svg(spec)
    assert render.png(drawing).startswith(b"\x89PNG")
    assert caplog.text == ""
    paths = re.findall("<path[^>]*>", drawing)
    assert sum("line mark" in path for path in paths) == (len(set(points)) > 1)
    assert sum('"point"' in path for path in paths) == len(points)


def test_thousands_of_tokens_per_parameter_are_no_power_of_e(built: Any) -> None:
    a = copy.deepcopy(built[1])
    a["answer"]["ref"]["arms"][0] |= {"ratio": 1790.0, "ratio_interval": [9.42, None]}
    assert "(D/N = 1.79K)" in " ".join(text.headline(a))
    assert "1.79K [at least 9.42] tokens per parameter" in text.compute_optimal(a)
    assert '1.79K <span class="iv">[at least 9.42]</span>' in tables.answer(a)


def test_insignificant_differences_are_called_so(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    twins = [r for r in rows if r["arm"] == "early"]
    for r in twins[:]:
        rng = np.random.default_rng(int(r["steps"] * 1000 + r["n"] + r["seed"]))
        noisy = {k: v + rng.normal(0, 0.004) for k, v in r.items() if k.startswith("loss_")}
        twins.append({**r, "arm": "late", "fusion": "late", **noisy})
    a = analyse(tmp_path / "s", twins)
    assert not a["answer"]["ref"]["clear"]
    assert "cannot say whether" in " ".join(text.headline(a))
    assert any(line.startswith("Which of early and late is better") for line in a["cannot"])


def test_a_full_disk_leaves_the_old_page_and_says_where(
    built: Any, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux has a device that is always full: what is written there fails as on such a disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    a, (_, rows) = built[1], planted
    (tmp_path / "report.html").write_text("the old page")
    monkeypatch.setattr("isofusion.report.page.analyse", lambda *_, **__: a)
    monkeypatch.setattr("isofusion.report.page.draw_figures", lambda *_: ({}, []))
    real, full = Path.open, Path("/dev/full")
    monkeypatch.setattr(Path, "open", lambda path, *how, **k: real(full if path.suffix == ".tmp" else path, *how, **k))
    with pytest.raises(OSError, match="No space left") as caught:
        build_report(tmp_path, rows)
    assert caught.value.filename == str(tmp_path / "report.html")
    monkeypatch.setattr(Path, "open", real)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.html": "the old page"}


def test_damaged_losses_of_documents_are_left_out(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out / "runs", tmp_path / "runs")
    assert all(entry["docs"] > 0 for entry in evidence.image_use(tmp_path, rows))
    whole = {path: path.read_bytes() for path in tmp_path.glob("runs/*/eval_docs.npz")}
    for cut in (slice(0), slice(20), slice(-1), None):
        for path, data in whole.items():
            path.write_bytes(data[:100] + bytes(40) + data[140:] if cut is None else data[cut])
        found = evidence.image_use(tmp_path, rows)
        assert found
        assert not any(entry["docs"] for entry in found)


def test_another_image_that_was_not_shown_is_no_zero(planted: Any, tmp_path: Path) -> None:
    """Of three documents one has most of the pictures: eval_docs.npz repeats the true loss, eval.json has none."""
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    rows = [row for row in rows if row["arm"] == "early"]
    place = tmp_path / "s" / evidence.champions(rows)["early"]["eval_path"]
    found = json.loads(place.read_text())
    found["domains"]["interleaved"]["shuffled"] = None
    place.write_text(json.dumps(found))
    with np.load(place.with_name("eval_docs.npz")) as docs:
        arrays = dict(docs)
    np.savez(
        place.with_name("eval_docs.npz"), **(arrays | {"interleaved/doc_shuffled": arrays["interleaved/doc_true"]})
    )
    use = evidence.image_use(tmp_path / "s", rows)
    assert [("d_shuffled" in r, "d_blind" in r) for r in use] == [(True, True), (False, True)]
    caption = text.image_use({"image_use": use, "entropy": {}})
    assert "Too few validation documents of interleaved have images" in caption
    assert "early interleaved" not in caption


def test_a_domain_that_was_trained_and_not_validated_is_left_open(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    assert not any("never validated" in line for line in analyse(tmp_path / "s", rows)["cannot"])
    a = analyse(tmp_path / "s", [{k: v for k, v in row.items() if k != "loss_text"} for row in rows])
    line = next(line for line in a["cannot"] if "never validated" in line)
    assert line.startswith("Anything about the domain text")


def test_validation_that_was_trained_on_is_a_warning(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    rows = [row for row in rows if row["arm"] == "early"]
    longest = max(rows, key=lambda row: row["tokens"])["run"]
    leak = "40 of 40 images of validation are in training too: its loss may be too low"
    ledger = {"sources": [{"name": "photos", "epochs": 0.5, "leaks": [leak]}, {"name": "prose", "leaks": []}]}
    (tmp_path / "s" / "runs" / longest / "data.json").write_text(json.dumps(ledger))
    page = undrawn(analyse(tmp_path / "s", rows))
    assert f"<b>validation-seen</b> photos: {leak}" in page


@pytest.mark.parametrize(
    ("lock", "command"),
    [
        ({}, "planted.toml"),
        ({"toml": "mine.toml", "data": None, "overrides": []}, "mine.toml"),
        (
            {"toml": "studies/a b.toml", "data": "shards", "overrides": ["train.lr=0.01"]},
            "'studies/a b.toml' --data shards --set train.lr=0.01",
        ),
        ({"toml": "/home/ann/x.toml", "data": "/secret/place"}, "x.toml --data FOLDER"),
        (
            {
                "toml": "x.toml",
                "overrides": [
                    "data.tokenizer=/home/ann/tok.json",
                    'data.folder="/secret/my place"',
                    'data.sources.t.train=["/home/ann/*.tar", "b/*.tar"]',
                    "data.tokenizer=mine/tok.json",
                ],
            },
            "x.toml --set data.tokenizer=FILE --set 'data.folder=\"FOLDER\"' "
            '--set \'data.sources.t.train=["FILE", "b/*.tar"]\' --set data.tokenizer=mine/tok.json',
        ),
    ],
)
def test_the_command_is_the_one_that_was_typed(
    planted: Any, tmp_path: Path, lock: dict[str, Any], command: str
) -> None:
    out, rows = planted
    (tmp_path / "study.lock").write_text(json.dumps(json.loads((out / "study.lock").read_text()) | lock))
    read = read_json(tmp_path / "study.lock") or {}
    read["spec"]["data"]["tokenizer"] = "/home/ann/tok.json"
    found = methods(tmp_path, read, rows, [], [], {"study": STUDY})
    page = tables.methods({"methods": found, "study": STUDY, "tuning": {}})
    assert "tokenizer tok.json" in page
    assert f"isofusion study run {html.escape(command)} --out runs/planted-again</pre>" in page
    assert "/home" not in page
    assert "/secret" not in page


def test_a_failed_fit_becomes_a_warning(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    sizes = sorted({r["n"] for r in rows if r["arm"] == "late"})[:2]
    few = [r for r in rows if r["arm"] in ("early",) or (r["arm"] == "late" and r["n"] in sizes)]
    a = analyse(tmp_path / "s", few)
    page = undrawn(a)
    assert not a["fits"]["late"]["caption"]["ok"]
    assert a["fits"]["late"]["caption"]["reason"].startswith("2 model sizes")
    assert "late / caption, late / interleaved and late / text: no law: 2 model sizes" in page
    assert a["warnings"][0]["code"] == "no-fit"
    assert a["answer"]["without_law"] == ["late"]
    assert "No law, and so no rank, for late" in page


@pytest.mark.parametrize(("gone", "low"), [("A", True), ("B", False)])
def test_of_draws_without_optimum_only_the_side_is_known(planted: Any, built: Any, gone: str, low: bool) -> None:
    """A tenth of the draws has the best size below (above) all that are tried: the end of the grid had been quoted."""
    laws = fit_arm(planted[1], "early", ["caption"], "exact")
    drawn = laws.intervals["caption"]
    lost = np.where(np.arange(len(drawn.draws)) % 10, getattr(drawn.draws, gone), 1e-12)
    drawn = replace(drawn, draws=replace(drawn.draws, **{gone: lost}))
    laws = replace(laws, intervals={"caption": drawn})
    front = frontier(laws, ["caption"], np.geomspace(laws.runs["caption"].c.min(), laws.runs["caption"].c.max(), 5))
    assert front is not None
    known, unknown = ("hi", "lo") if low else ("lo", "hi")
    assert front[f"n_{unknown}"] == front[f"d_{known}"] == front[f"ratio_{known}"] == [None] * 5
    assert None not in front[f"n_{known}"] + front[f"d_{unknown}"] + front["loss_lo"] + front["loss_hi"]
    a = copy.deepcopy(built[1])
    early = a["frontier"]["early"]["mean"]
    early |= {key: [front[key][0]] * len(early["c"]) for key in ("n_lo", "n_hi")}
    drawing = compute_optimal(a, WIDE)
    assert drawing is not None
    assert '"lo": null' not in json.dumps(drawing.to_dict())
    assert '"hi": null' not in json.dumps(drawing.to_dict())
    assert "Where a band runs off the axes" in text.compute_optimal(a)
    assert "Where a band runs off the axes" not in text.compute_optimal(built[1])
    side = "at most" if low else "at least"
    assert words.interval((front["n_lo"][0], front["n_hi"][0]), how=words.si).startswith(f"[{side} ")


def test_a_floor_that_few_trunks_cannot_show_has_no_interval(planted: Any, tmp_path: Path) -> None:
    """Three trunks leave no freedom for their luck: the page gives E without an interval, and says why."""
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    sizes = sorted({r["n"] for r in rows if r["arm"] == "late"})[:3]
    few = [r for r in rows if r["arm"] == "early" or (r["arm"] == "late" and r["n"] in sizes)]
    a = analyse(tmp_path / "s", few)
    early, late = (a["fits"][arm]["caption"] for arm in ("early", "late"))
    assert early["interval"]["E"] is not None
    assert not early["refused"]
    assert late["interval"]["E"] is None
    assert "degrees of freedom" in late["refused"]["E"]
    assert "E has no interval where the noise between trunks" in undrawn(a)


class Wire(Executor):
    """What another process does to a task: everything is pickled on its way there and back."""

    def submit(self, make: Any, *inputs: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        make, inputs = pickle.loads(pickle.dumps((make, inputs)))
        future.set_result(pickle.loads(pickle.dumps(make(*inputs))))
        return future


def test_a_second_process_changes_no_number(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    some = [{**r, "loss_text": None, "loss_interleaved": None} for r in rows if r["arm"] in ("early", "late")]
    alone = analyse(tmp_path / "s", some)
    assert alone["fits"]["late"]["caption"]["ok"]
    assert analyse(tmp_path / "s", some, pool=Wire()) == alone


def test_without_any_law_the_page_says_so_and_stands(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    one = [r for r in rows if r["arm"] == "early" and r["size"] == "s16" and r["seed"] == 0]
    page = build_report(tmp_path / "s", one).read_text()
    assert "No law could be fitted" in page
    assert "One run is not a recommendation" in page
    assert "Not drawn, because" in page


def test_an_arm_without_losses_is_named_once(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    lossless = {f"loss_{domain}": None for domain in ("caption", "interleaved", "text", "mean")}
    few = [r | lossless for r in rows if r["arm"] == "early"]
    few += [r for r in rows if r["arm"] == "late" and r["size"] == "s16"]
    told = text.headline(analyse(tmp_path / "s", few))[0]
    assert "(early / caption: no domain has usable losses: run " in told
    assert told.count("early / ") == 1
    assert "arm early" not in told


def test_real_data_without_entropy_or_documents(planted: Any, tmp_path: Path) -> None:
    out, rows = planted
    shutil.copytree(out, tmp_path / "s")
    for path in (tmp_path / "s").glob("runs/*/eval*"):
        path.unlink()
    bare = [{**r, **{k: None for k in r if k.startswith(("oracle_", "bound_"))}} for r in rows if r["arm"] == "early"]
    page = undrawn(analyse(tmp_path / "s", bare))
    assert "Whether another architecture would do better" in page
    assert "Dotted: the oracle entropy" not in page
    assert "Fitted irreducible loss against the oracle entropy" not in page


def test_a_legend_names_what_is_drawn_and_can_be_seen(built: Any) -> None:
    _, a, _ = built

    def legend(name: str, a: dict[str, Any]) -> dict[str, Any]:
        layers = DRAW[name](a, WIDE).to_dict()["concat"][0]["layer"]
        return next(layer["encoding"]["color"] for layer in layers if "color" in layer["encoding"])

    own = [{**r, "oracle": None, "bound": None} for r in a["classes"]]  # real data: nobody knows its entropy
    arms = a["study"]["arms"]
    assert legend("loss-by-class", a)["scale"]["domain"] == [*arms, "oracle entropy", "learner's bound", "chance"]
    assert legend("loss-by-class", a | {"classes": own})["scale"]["domain"] == [*arms, "chance"]
    open_marks = [{**p, "heldout": False} for p in a["predicted"]]
    assert legend("predicted-against-observed", a)["legend"]["symbolStrokeWidth"] == 0
    assert legend("predicted-against-observed", a | {"predicted": open_marks})["legend"]["symbolStrokeWidth"] > 0


def test_no_finished_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run has finished"):
        analyse(tmp_path, [])


def test_paired_difference_against_the_formula() -> None:
    targets, extra = np.array([10.0, 20.0, 30.0]), np.array([1.0, 4.0, 3.0])
    found = evidence.paired(targets, extra)
    assert found is not None
    diff = 8 / 60
    se = math.sqrt(1.5 * sum((e - diff * t) ** 2 for e, t in zip(extra, targets, strict=True))) / 60
    assert found["diff"] == pytest.approx(diff)
    assert found["se"] == pytest.approx(se)
    assert found["t"] == pytest.approx(diff / se)


def test_seed_spread_and_tuning_verdicts() -> None:
    points = [{"arm": "a", "size": "s", "steps": 1, "loss": {"text": v, "mean": v}} for v in (1.0, 1.2)]
    assert evidence.noise(points, ["text"])["text"]["sd"] == pytest.approx(math.sqrt(0.02))
    row = {"arm": "a", "size": "s", "steps": 1, "seed": 0, "variant": "", "loss_mean": 1.0}
    sweep = [{**row, "variant": "lr0.5x", "loss_mean": 1.1}, {**row, "variant": "lr2x", "loss_mean": 1.2}]
    assert evidence.tuning([row], sweep, ["a", "b"])["a"]["verdict"] == "tuned"
    assert evidence.tuning([row], sweep, ["a", "b"])["b"]["verdict"] == "untuned"
    edge = [{**row, "variant": "lr0.5x", "loss_mean": 1.1}, {**row, "variant": "lr2x", "loss_mean": 0.9}]
    assert "edge" in evidence.tuning([row], edge, ["a"])["a"]["detail"]


def test_words() -> None:
    assert words.si(1_234_567) == "1.23M"
    assert words.si(999_900) == "1.00M"
    assert words.power(2.44e12) == "2.4·10¹²"
    assert words.power(9.97e12) == "1.0·10¹³"
    assert words.fixed(-0.0123) == "−0.012"
    assert words.percent(0.0001) == "< 0.1 %"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.pretty("2.5e05 and -2.5e+05 of 3.2e+18, (1e9)") == "250K and −250K of 3.2·10¹⁸, (1.00B)"
    for name in ("next-n2.5e05-s0", "early_2.5e05", "v1.2.5e05", "a-2.5e05-s0", "n25e05"):
        assert words.pretty(f"run {name}: 1e9") == f"run {name}: 1.00B"


def test_log_ticks_and_colours() -> None:
    assert log_ticks(1e9, 1e13) == [1e9, 1e10, 1e11, 1e12, 1e13]
    assert len(log_ticks(2e6, 9e6)) >= 2
    both = arm_styles(["early", "late", "early-moe", "new"])
    assert both["early"]["colour"] == arm_styles(["early"])["early"]["colour"]
    assert len({s["colour"] for s in both.values()}) == 4


def test_the_report_never_imports_torch() -> None:
    code = "import sys, isofusion.report.page, isofusion.report.analysis; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def browser(profile: Path) -> list[str]:
    """Chromium without a window, as the start of a command; the test is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here: pages are not laid out")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={profile}"]
    return [found, *flags]


def measured(page: str, width: int, what: str, tmp_path: Path) -> str:
    """What a browser says of the page's document d at so many pixels; a test is skipped without one."""
    frame = tmp_path / "frame.html"
    # a phone is narrower than a headless window may be, so the page is measured inside a frame
    report = json.dumps(page).replace("</", "<\\/")
    frame.write_text(
        f"<iframe id=f width={width} height=2000></iframe><p id=r></p><script>const f=document.getElementById('f');"
        "f.onload=()=>{const d=f.contentDocument.documentElement;"
        f"document.getElementById('r').textContent='found '+({what})+';';}};"
        f"f.srcdoc={report};</script>"
    )
    command = [*browser(tmp_path / "profile"), "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    found = re.search(r"<p id=\"r\">found ([^;]*);", shown)
    if found is None:
        pytest.skip("chromium gave no page here")
    return found[1]


def test_a_browser_shows_the_page_without_sideways_scroll(built: Any, tmp_path: Path) -> None:
    found = measured((built[0] / "report.html").read_text(), 390, "d.scrollWidth+' of '+d.clientWidth", tmp_path)
    wide, window = found.split(" of ")
    assert int(wide) <= int(window)


def test_every_table_fits_on_a_desktop(built: Any, tmp_path: Path) -> None:
    """At 1,100 pixels the last columns of the recommendation, the laws and two more had to be scrolled to."""
    cut = (
        "[...d.querySelectorAll('details')].map(e=>e.open=true)&&[...d.querySelectorAll('.scroll')]"
        ".filter(e=>e.scrollWidth>e.clientWidth+1).map(e=>e.innerText.slice(0,40)).join(',')"
    )
    assert measured((built[0] / "report.html").read_text(), 1100, cut, tmp_path) == ""


def test_paper_is_no_telephone(built: Any, tmp_path: Path) -> None:
    """A sheet is narrower than the width below which the page takes a telephone's shape."""
    out, _, page = built
    narrow = page.index("(max-width:760px)")
    assert page[narrow - len("@media screen and ") : narrow] == "@media screen and "
    printed = page[page.index("@media print{") : page.index("</style>")]
    assert ".scroll{overflow:visible" in printed  # what does not fit is not cut off
    assert "h1,h2,h3{break-after:avoid}" in printed
    assert ".warn details{display:block}" in printed  # "and 3 more" is said on paper too
    sheets = tmp_path / "report.pdf"
    command = [*browser(tmp_path / "profile"), f"--print-to-pdf={sheets}", (out / "report.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=90)
    if not sheets.exists():
        pytest.skip("chromium printed nothing here")
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", sheets.read_bytes())) <= len(DRAW) + 2


def test_a_repeated_seed_of_the_held_out_size_is_averaged(built: Any) -> None:
    _, a, page = built
    said = page.split("Seeds averaged, error of a size's mean loss at each D: ")[1].split(".</p>")[0]
    for arm, domain in (("early", "caption"), ("late", "text")):
        mean = a["holdout"][arm][domain]["seeds_averaged"]
        if mean is None:
            assert f"{arm} {NAMES[domain]}" not in said
            continue
        assert mean["cells"] < a["holdout"][arm][domain]["runs"]
        error, carry = (words.percent(mean[k]) for k in ("mae_reducible", "carry_over"))
        assert f"{arm} {NAMES[domain]} {error} (next size carried over {carry}" in said
    assert a["holdout"]["early"]["caption"]["seeds_averaged"]


def test_a_baseline_of_some_held_out_runs_stands_beside_the_law_on_these(built: Any) -> None:
    _, a, _ = built
    a = copy.deepcopy(a)
    held = a["holdout"]["early"]["caption"]
    runs = held["runs"]
    held |= {"error_reducible": 0.2, "beats_carry": False}
    held["beside"]["carry_over"] = {"runs": runs - 1, "mae_reducible": 0.011, "law_mae_reducible": 0.034}
    held["seeds_averaged"] |= {"cells": 4, "carried_cells": 3, "carry_over": 0.0123, "law_on_carried": 0.0456}
    table = tables_evidence.after("predicted-against-observed", a)
    assert f'<td>1.1 % <span class="iv below">(law 3.4 %, {runs - 1} runs)</span></td>' in table
    assert "In brackets" in table
    assert "(next size carried over 1.2 %, the law on the same 3 4.6 %" in table
    said = next(w for w in advice.warnings(a) if w["code"] == "holdout-worse")["items"][0]["text"]
    assert "3.4 %" in said
    assert "1.1 %" in said
    assert f"on the {runs - 1} of {runs} runs" in said
    assert "20.0 %" not in said
    others = [h for d, h in a["holdout"]["early"].items() if d != "caption" and h.get("ok")]
    law = (0.034 + sum(h["beside"]["carry_over"]["law_mae_reducible"] for h in others)) / (1 + len(others))
    assert f"the law on the same runs: {words.percent(law)}" in text.predicted_against_observed(a)


def test_the_report_warns_of_what_fit_warns_of(noisy: tuple[Path, list[dict[str, Any]]]) -> None:
    """It left out runs that decide an exponent, and baselines but carry-over that predict the held-out size better."""
    out, rows = noisy
    corner = next(r for r in rows if r["width"] == 56 and r["steps"] == 900)
    corner["loss_caption"] *= 0.9
    a = analyse(out, rows)
    domains = a["study"]["domains"]
    laws = fit_arm(rows, "late", domains, "exact")
    for domain in domains:
        told = law_warnings(laws.fits[domain], laws.intervals[domain])
        assert a["fits"]["late"][domain]["warnings"] == [{"code": w.code, "message": w.message} for w in told]
    said = {w["code"]: [i["text"] for i in w["items"]] for w in a["warnings"]}
    assert any("that run decides the answer" in text for text in said["odd-run"])
    assert any("poorly determined" in text for text in said["wide-interval"])
    held = a["holdout"]["late"]["caption"]
    held["beside"] = {
        "carry_over": {"runs": held["runs"], "mae_reducible": 0.03, "law_mae_reducible": 0.02},
        "power_law": {"runs": held["runs"], "mae_reducible": 0.01, "law_mae_reducible": 0.02},
        "nearest": {"runs": 0, "mae_reducible": None, "law_mae_reducible": None},
    }
    worse = next(w for w in advice.warnings(a) if w["code"] == "holdout-worse")["items"]
    assert {tuple(i["where"]): i["text"] for i in worse}["late / caption",] == (
        "the hold-out is predicted worse (2.0 % of the reducible loss) than by k C^c (1.0 %)"
    )
    assert "than by k·Cᶜ (1.0 %)" in undrawn(a | {"warnings": advice.warnings(a)})
