"""What the runs show beside their laws: token classes, fusion, use of the image, experts, noise floor, tuning, curves.

Everything is read from the run folders (eval.json, eval_docs.npz, metrics.jsonl) and the ledger's rows. Differences are
paired wherever the same documents or the same (size, seed, budget) were seen by both sides. Losses in nats per target.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit  # Student's t quantile; scipy.stats takes half a second to import

from isofusion.evaluate.routing import corrected_specialisation, specialisation

LEVEL = 0.95
"""Coverage of every interval in the report."""

Row = dict[str, Any]


def load_eval(out: Path, row: Row) -> dict[str, Any]:
    """eval.json of a row, or {} where it cannot be read (the caller warns)."""
    try:
        found = json.loads(eval_path(out, row).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def eval_path(out: Path, row: Row) -> Path:
    given = row.get("eval_path")
    path = Path(given) if given else out / "runs" / str(row["run"]) / "eval.json"
    return path if path.is_absolute() or path.exists() else out / path


def champions(rows: list[Row]) -> dict[str, Row]:
    """Per arm the branch with the most parameters, then the most tokens, then the first seed."""
    best: dict[str, Row] = {}
    for row in rows:
        rank = (row["n"], row["tokens"], -row["seed"])
        held = best.get(row["arm"])
        if held is None or rank > (held["n"], held["tokens"], -held["seed"]):
            best[row["arm"]] = row
    return best


def classes(out: Path, rows: list[Row]) -> list[dict[str, Any]]:
    """Loss per domain ("all") and token class of each arm's largest run, with its reference values."""
    found = []
    for arm, row in champions(rows).items():
        ev = load_eval(out, row)
        parts = {f"{domain}/": d for domain, d in ev.get("domains", {}).items()} | ev.get("classes", {})
        for key, entry in parts.items():
            domain, _, name = key.partition("/")
            if not entry or entry.get("loss") is None or not entry.get("targets", 1):
                continue
            if name == "unclassified" and entry.get("targets", 0) == ev["domains"].get(domain, {}).get("targets"):
                continue
            item = {
                "arm": arm,
                "run": row["run"],
                "domain": domain,
                "label": name or "all targets",
                "class": name or None,
            }
            for field in ("loss", "targets", "se", "oracle", "bound", "blind", "blind_se", "shuffled", "chance"):
                item[field] = number(entry.get(field))
            found.append(item)
    return sorted(found, key=lambda r: (r["domain"], r["class"] is not None))


def number(value: Any) -> float | None:
    """A finite float, or None."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def fusion(class_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fusion targets against log m (their chance level): who beats it, and whether a blind model does."""
    found = []
    for r in class_rows:
        if not r["class"] or "fusion" not in r["class"]:
            continue
        item = {k: r[k] for k in ("arm", "run", "domain", "class", "loss", "se", "blind", "blind_se", "targets")} | {
            "log_m": r["chance"]
        }
        item["margin"] = None if r["chance"] is None else r["chance"] - r["loss"]
        item["z"] = item["margin"] / r["se"] if item["margin"] is not None and r["se"] else None
        item["blind_margin"] = None if r["chance"] is None or r["blind"] is None else r["chance"] - r["blind"]
        item["blind_z"] = item["blind_margin"] / r["blind_se"] if item["blind_margin"] and r["blind_se"] else None
        found.append(item)
    return found


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """Mean and Student-t interval; no interval from fewer than two values."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = float(stdtrit(len(values) - 1, 0.5 + level / 2) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def verdict(lo: float | None, hi: float | None) -> str:
    """ "lower", "higher" (of the first side), or "cannot say"."""
    if lo is None or hi is None or lo <= 0.0 <= hi:
        return "cannot say"
    return "lower" if hi < 0 else "higher"


def fusion_compare(
    out: Path, rows: list[Row], pairs: list[tuple[str, str]], tiers: dict[float, str]
) -> list[dict[str, Any]]:
    """First less second arm on every fusion class, paired by (size, seed, steps); one value a trunk, t over trunks.

    "documents": the same at the largest size and budget that both have, paired by document; None without their sums.
    """
    by_arm: dict[str, dict[tuple[Any, ...], dict[str, float]]] = {}
    for row in rows:
        if not any(row["arm"] in pair for pair in pairs):
            continue
        losses = {
            key: entry["loss"]
            for key, entry in load_eval(out, row).get("classes", {}).items()
            if "fusion" in key and entry and number(entry.get("loss")) is not None
        }
        by_arm.setdefault(row["arm"], {})[(tiers[float(row["n"])], row["seed"], row["steps"])] = losses
    found = []
    for first, second in pairs:
        one, two = by_arm.get(first, {}), by_arm.get(second, {})
        names = sorted({name for losses in one.values() for name in losses})
        documents = _by_document(out, rows, first, second, tiers)
        for name in names:
            trunks: dict[tuple[Any, ...], list[float]] = {}
            for key in one.keys() & two.keys():
                if name in one[key] and name in two[key]:
                    trunks.setdefault(key[:2], []).append(one[key][name] - two[key][name])
            if not trunks:
                continue
            diff, lo, hi = t_interval(np.array([np.mean(v) for v in trunks.values()]))
            found.append(
                {
                    "first": first,
                    "second": second,
                    "class": name,
                    "diff": diff,
                    "lo": lo,
                    "hi": hi,
                    "trunks": len(trunks),
                    "pairs": sum(map(len, trunks.values())),
                    "verdict": verdict(lo, hi),
                    "documents": documents.get(name),
                }
            )
    return found


def _by_document(out: Path, rows: list[Row], first: str, second: str, tiers: dict[float, str]) -> dict[str, Any]:
    """Per fusion class `paired` of first less second over the validation documents, with size, steps and seeds.

    At the largest (size, steps) that both arms have; a document's difference is the mean over their common seeds.
    """
    runs: dict[tuple[str, int], dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row["arm"] in (first, second):
            seeds = runs.setdefault((tiers[float(row["n"])], row["steps"]), {})
            seeds.setdefault(row["seed"], {})[row["arm"]] = row
    both = {key: [p for p in seeds.values() if len(p) == 2] for key, seeds in runs.items()}
    at = max((key for key in both if both[key]), key=lambda k: (both[k][0][first]["n"], k[1]), default=None)
    if at is None:
        return {}
    sides = [
        tuple(_docs(eval_path(out, pair[arm]).with_name("eval_docs.npz")) for arm in (first, second))
        for pair in both[at]
    ]
    found = {}
    for name in {name for docs in sides[0] for name in docs if "fusion" in name}:
        arrays = [side.get(name, {}) for docs in sides for side in docs]
        targets = arrays[0].get("targets")
        # the same documents, or no pairing
        if targets is None or not all("true" in x and np.array_equal(x.get("targets", ()), targets) for x in arrays):
            continue
        extra = np.mean([one[name]["true"] - two[name]["true"] for one, two in sides], axis=0)
        if difference := paired(targets, extra):
            found[name] = difference | {"size": at[0], "steps": at[1], "seeds": len(sides)}
    return found


def image_use(out: Path, rows: list[Row]) -> list[dict[str, Any]]:
    """True, shuffled and blind loss per domain of each arm's largest run, differences paired by document."""
    found = []
    for arm, row in champions(rows).items():
        ev = load_eval(out, row)
        docs = _docs(eval_path(out, row).with_name("eval_docs.npz"))
        for domain, entry in ev.get("domains", {}).items():
            true, other, blind = (number(entry.get(k)) for k in ("loss", "shuffled", "blind"))
            if other is None and blind is None:
                continue
            item: dict[str, Any] = {"arm": arm, "run": row["run"], "domain": domain}
            item |= {"true": true, "shuffled": other, "blind": blind, "docs": 0}
            arrays = docs.get(domain, {})
            for kind in ("shuffled", "blind"):  # a kind without a loss was not measured: its array repeats the true one
                if item[kind] is not None and "targets" in arrays and "true" in arrays and kind in arrays:
                    item["docs"] = len(arrays["targets"])
                    item[f"d_{kind}"] = paired(arrays["targets"], arrays[kind] - arrays["true"])
            if true is not None and any(v is not None and v != true for v in (other, blind)):  # text has no image
                found.append(item)
    return found


def paired(targets: np.ndarray, extra: np.ndarray, level: float = LEVEL) -> dict[str, float] | None:
    """Extra nll per target with a ratio-estimator standard error over documents: diff, se, t, lo, hi.

    targets [docs], extra [docs] in summed nats. Documents without targets carry nothing and are left out.
    """
    good = (targets > 0) & np.isfinite(extra)
    targets, extra = targets[good].astype(float), extra[good].astype(float)
    n, total = len(targets), targets.sum()
    if n < 2:
        return None
    diff = float(extra.sum() / total)
    se = float(math.sqrt(n / (n - 1) * ((extra - diff * targets) ** 2).sum()) / total)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * se
    return {"diff": diff, "se": se, "t": diff / se if se else math.inf, "lo": diff - half, "hi": diff + half, "docs": n}


def _docs(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Domain or "domain/class" -> {"targets", "true", "shuffled", "blind"}, an array over documents each.

    Names in the file: "caption/doc_true", "caption/fusion-after_true".
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                key, _, kind = name.rpartition("_")
                found.setdefault(key.removesuffix("/doc"), {})[kind] = arrays[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}
    return found


def experts(out: Path, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Per expert arm: share of text and of image tokens each expert takes, and specialisation per layer.

    Specialisation is arXiv 2504.07951 section 4.4: the mean over experts of 1 − H(p), H in bits, p the share of text
    among the expert's tokens ("score"); "balanced" is the same after both modalities are given equal weight.
    """
    found = {}
    for arm, row in champions(rows).items():
        routing = load_eval(out, row).get("routing")
        counts = {kind: _routing_counts(routing, kind) for kind in ("text", "image")} if routing else {}
        if not counts or counts["text"] is None or counts["image"] is None:
            continue
        if not counts["text"].sum() or not counts["image"].sum():
            continue
        shares = {k: c / np.maximum(c.sum(axis=1, keepdims=True), 1) for k, c in counts.items() if c is not None}
        found[arm] = {
            "run": row["run"],
            "shares": {k: v.tolist() for k, v in shares.items()},
            "score": specialisation(counts["text"], counts["image"]).tolist(),
            "balanced": corrected_specialisation(counts["text"], counts["image"]).tolist(),
        }
    return found


def _routing_counts(routing: dict[str, Any], kind: str) -> np.ndarray | None:
    """[layers, experts] counts of one modality, summed over domains; eval.json holds domain -> modality -> counts."""
    parts = [np.asarray(d[kind], dtype=float) for d in routing.values() if isinstance(d, dict) and d.get(kind)]
    parts = [p for p in parts if p.ndim == 2]
    return np.sum(parts, axis=0) if parts else None


def noise(points: list[dict[str, Any]], domains: list[str]) -> dict[str, dict[str, Any]]:
    """Standard deviation of the loss over seeds, pooled over every (arm, size, steps) with at least two seeds."""
    found: dict[str, dict[str, Any]] = {}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for p in points:
        groups.setdefault((p["arm"], p["size"], p["steps"]), []).append(p)
    for domain in [*domains, "mean"]:
        squares, freedom, used = 0.0, 0, 0
        for members in groups.values():
            values = np.array([m["loss"][domain] for m in members if m["loss"].get(domain) is not None])
            if len(values) >= 2:
                squares += float(((values - values.mean()) ** 2).sum())
                freedom += len(values) - 1
                used += 1
        if freedom:
            found[domain] = {"sd": math.sqrt(squares / freedom), "groups": used, "freedom": freedom}
    return found


def tuning(rows: list[Row], sweep: list[Row], arms: list[str]) -> dict[str, dict[str, Any]]:
    """Per arm a verdict on the learning rate from the sweep runs (variant "lr0.5x"): "untuned" unless it is interior
    at every size and budget swept; `detail` says where the arm's longest budget was not."""
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        mine = [r for r in sweep if r["arm"] == arm]
        if not mine:
            found[arm] = {"verdict": "untuned", "detail": "no learning-rate sweep was run", "corners": []}
            continue
        corners = []
        for size, steps in sorted({(r["size"], r["steps"]) for r in mine}, key=str):
            losses = {_factor(r): number(r.get("loss_mean")) for r in mine if (r["size"], r["steps"]) == (size, steps)}
            seed = next(r["seed"] for r in mine if (r["size"], r["steps"]) == (size, steps))
            for r in rows:
                if (r["arm"], r["size"], r["steps"], r["seed"]) == (arm, size, steps, seed):
                    losses[1.0] = number(r.get("loss_mean"))
            tried = {k: v for k, v in sorted(losses.items()) if v is not None}
            if len(tried) < 2:
                continue
            best = min(tried, key=lambda k: tried[k])
            inside = min(tried) < best < max(tried)
            corners.append(
                {
                    "size": size,
                    "steps": steps,
                    "best": best,
                    "interior": inside,
                    "losses": {f"{k:g}": v for k, v in tried.items()},
                    "gain": (tried[1.0] - tried[best]) if 1.0 in tried else None,
                }
            )
        edge = [c for c in corners if not c["interior"]]
        if not corners or edge:
            detail = "; ".join(f"{c['size']} at {c['steps']} steps is best at {c['best']:g}×" for c in edge)
            found[arm] = {"verdict": "untuned", "detail": f"minimum at the edge of the sweep: {detail}" if detail else
                          "the sweep has no finished corner", "corners": corners}  # fmt: skip
            continue
        worst = max((c["gain"] or 0.0) for c in corners)
        detail = f"minimum interior at all {len(corners)} corners; at most {worst:.3f} nats/token left"
        swept, longest = max(c["steps"] for c in corners), max((r["steps"] for r in rows if r["arm"] == arm), default=0)
        if swept < longest:
            detail += f"; swept up to {swept:,} of {longest:,} steps only"
        found[arm] = {"verdict": "tuned", "detail": detail, "corners": corners}
    return found


def _factor(row: Row) -> float:
    try:
        return float(str(row.get("variant", "")).removeprefix("lr").removesuffix("x"))
    except ValueError:
        return math.nan


def training_curves(out: Path, rows: list[Row], tiers: dict[float, str], most: int = 40) -> list[dict[str, Any]]:
    """Training loss against tokens of each branch and its trunk (first seed), averaged in log-spaced bins of tokens."""
    seed = min((r["seed"] for r in rows), default=0)
    chosen = [r for r in rows if r["seed"] == seed]
    runs: dict[str, dict[str, Any]] = {}
    for r in chosen:
        entry = {"arm": r["arm"], "size": tiers[float(r["n"])]}
        runs[r["run"]] = {**entry, "run": r["run"], "kind": "branch"}
        if r.get("parent"):
            runs.setdefault(r["parent"], {**entry, "run": r["parent"], "kind": "trunk"})
    found = []
    for name, entry in runs.items():
        tokens, loss = _metrics(out / "runs" / name / "metrics.jsonl")
        if len(tokens) < 2:
            continue
        count = most if entry["kind"] == "trunk" else 8
        edges = np.geomspace(tokens[0], tokens[-1] * 1.0001, count + 1)
        spot = np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, count - 1)
        bins = [spot == i for i in range(count) if (spot == i).any()]
        entry["tokens"] = [float(f"{tokens[b].mean():.5g}") for b in bins]
        entry["loss"] = [float(f"{loss[b].mean():.5g}") for b in bins]
        found.append(entry)
    trunks = {c["run"]: c for c in found if c["kind"] == "trunk"}
    parents = {r["run"]: r.get("parent") for r in chosen}
    for curve in found:  # a branch is drawn from where it left its trunk
        trunk = trunks.get(parents.get(curve["run"]) or "")
        before = [i for i, t in enumerate(trunk["tokens"]) if t < curve["tokens"][0]] if trunk else []
        if trunk and before:
            curve["tokens"].insert(0, trunk["tokens"][before[-1]])
            curve["loss"].insert(0, trunk["loss"][before[-1]])
    return found


def _metrics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    tokens, loss = [], []
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the line a kill cut short
            continue
        t, value = number(record.get("tokens")), number(record.get("loss"))
        if t and value is not None:
            tokens.append(t)
            loss.append(value)
    order = np.argsort(tokens, kind="stable")
    return np.array(tokens)[order], np.array(loss)[order]
