"""A made study folder: four arms, four sizes, four budgets from planted laws, with the files a real study leaves."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOMAINS = ("caption", "interleaved", "text")
ORACLE = {"caption": 0.62, "interleaved": 0.75, "text": 1.55}
CHANCE = math.log(512)
WIDTHS = (16, 30, 51, 82)  # the longest run of each costs what the next shorter one of the next width does
STEPS = (100, 210, 440, 900)
TOKENS_PER_STEP = 3_600
LAWS = {  # arm -> factor on A, on B; E = oracle + 0.03
    "early": (1.0, 1.0),
    "late": (1.12, 1.05),
    "early-moe": (0.80, 1.04),
    "early-moe-routed": (0.90, 1.06),
}
BASE = {
    "caption": (70.0, 0.42, 900.0, 0.50),
    "interleaved": (55.0, 0.40, 700.0, 0.48),
    "text": (30.0, 0.36, 300.0, 0.42),
}
CLASSES = {"grammar": 0.02, "lookup": 0.9, "spatial": 0.3, "fusion-before": 1.35, "fusion-after": 1.35}
LOG_M = math.log(4)
LATE_BEFORE = 0.05
"""How much worse late is, document by document, on questions before the image."""
ASKED = {  # fusion targets of each document
    d: {name: np.random.default_rng(k).integers(0, 3, 400).astype(float)
        for k, name in enumerate(("fusion-after", "fusion-before"))}
    for d in DOMAINS
}  # fmt: skip


def planted_loss(arm: str, domain: str, n: float, d: float) -> float:
    a_factor, b_factor = LAWS[arm]
    A, alpha, B, beta = BASE[domain]
    return ORACLE[domain] + 0.03 + a_factor * A / n**alpha + b_factor * B / d**beta


def make_study(
    out: Path,
    arms: tuple[str, ...] = tuple(LAWS),
    noise: float = 0.002,
    entropy: bool = True,
    widths: tuple[int, ...] = WIDTHS,
) -> list[dict[str, Any]]:
    """Write runs/, study.lock and env files under `out`; returns the ledger's rows."""
    rows = []
    for arm in arms:
        for i, width in enumerate(widths):
            seeds = (0, 1, 2) if i in (0, len(widths) - 1) and arm == arms[0] else (0,)
            for seed in seeds:
                rows += _trunk(out, arm, i, width, seed, noise, entropy)
    lock = {
        "format": 1,
        "locked_at": "2025-01-01T00:00:00+00:00",
        "spec": {
            "name": "planted",
            "title": "Planted laws",
            "holdout": "largest-size",
            "compute": "exact",
            "seeds": [0],
            "budgets": [s * 4096 for s in STEPS],
            "data": {"row_len": 256, "image_size": 32, "patch_size": 8, "sources": [
                {"name": f"world-{d}", "domain": d, "format": "world", "weight": w}
                for d, w in zip(DOMAINS, (0.45, 0.45, 0.10), strict=True)
            ]},
        },
        "digest": "d" * 64,
        "analysis": {"holdout": "largest-size", "compute": "exact", "exclude": [], "metric": "validation loss"},
        "analysis_digest": "a" * 64,
        "runs": {},
        "versions": {"python": "3.11", "numpy": "2.0", "isofusion": "0.1"},
        "jobs": 2,
        "threads": 1,
    }  # fmt: skip
    (out / "study.lock").write_text(json.dumps(lock))
    return rows


def _trunk(out: Path, arm: str, i: int, width: int, seed: int, noise: float, entropy: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(zlib.crc32(f"{arm}{width}{seed}".encode()))
    luck = {d: rng.normal(0, noise) for d in DOMAINS}
    n = 2.0 * 512 * width + 4 * 12 * width**2
    if arm == "late":
        n *= 1.02
    experts = "moe" in arm
    trunk = f"{arm}-s{width}-s{seed}-trunk"
    _metrics(out / "runs" / trunk, arm, n, 1, int(0.8 * STEPS[-1]), rng)
    rows = []
    for k, steps in enumerate(STEPS):
        tokens = float(steps * TOKENS_PER_STEP)
        run = f"{arm}-s{width}-s{seed}-d{steps}"
        folder = out / "runs" / run
        _metrics(folder, arm, n, int(0.8 * steps) + 1, steps, rng)
        losses = {d: planted_loss(arm, d, n, tokens) + luck[d] + rng.normal(0, noise / 2) for d in DOMAINS}
        flops = (6 * n + 900 * math.sqrt(n)) * tokens * (1.03 if experts else 1.0)
        ev = _eval(arm, losses, tokens, flops, i, k, rng, entropy)
        (folder / "eval.json").write_text(json.dumps(ev))
        docs = {}
        for d in DOMAINS:
            targets = rng.integers(8, 40, 400).astype(float)
            true = targets * losses[d] + rng.normal(0, 1, 400)
            docs[f"{d}/doc_targets"], docs[f"{d}/doc_true"] = targets, true
            for kind, extra in (("shuffled", 0.12), ("blind", 0.09)):
                docs[f"{d}/doc_{kind}"] = true + (0 if d == "text" else 1) * (extra * targets + rng.normal(0, 1.5, 400))
            for name in ("fusion-after", "fusion-before") if d != "text" else ():
                asked = ASKED[d][name]
                luck_D = np.random.default_rng(1).normal(0, 0.5, 400)  # what is hard about a document is so for all
                worse = LATE_BEFORE if (arm, name) == ("late", "fusion-before") else 0.0
                docs[f"{d}/{name}_targets"] = asked
                docs[f"{d}/{name}_true"] = asked * (0.9 + worse + luck_D + rng.normal(0, 0.02, 400))
                docs[f"{d}/{name}_blind"] = docs[f"{d}/{name}_shuffled"] = asked * LOG_M
        np.savez(folder / "eval_docs.npz", **docs)
        row: dict[str, Any] = {
            "run": run, "arm": arm, "fusion": "late" if arm == "late" else "early", "n_experts": 4 if experts else 0,
            "size": f"s{width}", "seed": seed, "variant": "", "parent": trunk, "width": width, "depth": 4,
            "n_encoder": n * 0.2 if arm == "late" else 0, "n_decoder": n * (0.8 if arm == "late" else 1.0),
            "n_total": n * (2.5 if experts else 1.0), "n_active": n, "n_nonembedding": n / 2, "n": n, "tokens": tokens,
            "text_tokens": tokens * 0.55, "image_tokens": tokens * 0.45, "flops": flops, "flops_6nd": 6 * n * tokens,
            "loss_mean": float(np.mean(list(losses.values()))), "wall_s": steps * 0.05, "tokens_per_s": 72_000.0,
            "steps": steps, "eval_path": f"runs/{run}/eval.json",
        }  # fmt: skip
        for d in DOMAINS:
            row |= {f"{key}_{d}": ev["domains"][d][key] for key in ("loss", "oracle", "bound", "blind", "shuffled")}
        rows.append(row)
        (folder / "DONE").write_text("")
    return rows


def _eval(
    arm: str, losses: dict[str, float], tokens: float, flops: float, i: int, k: int, rng: Any, entropy: bool
) -> dict[str, Any]:
    domains, classes = {}, {}
    for d, loss in losses.items():
        image = 0.0 if d == "text" else 1.0
        domains[d] = {
            "loss": loss, "targets": 9000, "se": 0.004, "blind": loss + 0.09 * image, "shuffled": loss + 0.12 * image,
            "bits_per_byte": None, "oracle": ORACLE[d] if entropy else None,
            "bound": ORACLE[d] + 100 / tokens**0.5 if entropy else None, "chance": CHANCE,
        }  # fmt: skip
        for name, floor in CLASSES.items():
            if d == "text" and name not in ("grammar", "lookup"):
                continue
            value = floor + 0.4 * loss
            if "fusion" in name:
                gain = (0.05 + 0.06 * i + 0.03 * k) * (0.8 if arm == "late" and name == "fusion-before" else 1.0)
                value = LOG_M - gain + rng.normal(0, 0.01)
            classes[f"{d}/{name}"] = {
                "loss": value, "targets": 1200, "se": 0.012, "oracle": 0.0 if entropy else None, "blind": LOG_M + 0.01
                if "fusion" in name else value, "blind_se": 0.013, "shuffled": value + 0.2,
                "chance": LOG_M if "fusion" in name else None,
            }  # fmt: skip
    routing = None
    if "moe" in arm:
        experts = 2 if "routed" in arm else 4
        counts = rng.integers(200, 1000, (2, 4, experts)) if experts == 4 else np.zeros((2, 4, 2), int)
        if experts == 2:
            counts[0, :, 0], counts[1, :, 1] = 4000, 3000
        routing = {"caption": {"text": counts[0].tolist(), "image": counts[1].tolist()}}
    mean = float(np.mean(list(losses.values())))
    return {
        "step": 1, "tokens": tokens, "text_tokens": tokens * 0.55, "image_tokens": tokens * 0.45, "flops": flops,
        "flops_6nd": flops, "domains": domains, "classes": classes, "mean": mean, "routing": routing,
    }  # fmt: skip


def _metrics(folder: Path, arm: str, n: float, first: int, last: int, rng: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(first, last + 1):
        d = step * TOKENS_PER_STEP
        loss = np.mean([planted_loss(arm, domain, n, d) for domain in DOMAINS]) * 1.02 + rng.normal(0, 0.02)
        lines.append(json.dumps({"step": step, "tokens": d, "loss": float(loss)}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    env = {"python": "3.11", "torch": "2.11", "cpu": "test processor", "threads": 1}
    (folder / "env.json").write_text(json.dumps(env))
    own = (last - first + 1) * TOKENS_PER_STEP
    total = last * TOKENS_PER_STEP
    spent = {"own_tokens": own, "tokens": total, "flops": {"total": 6 * n * total}, "wall_s": 0.02 * (last - first + 1)}
    spent |= {"own_flops": 6 * n * own * (0.8 if arm == "late" else 1.0), "peak_memory": 1e8 + 24 * n}
    spent |= {"input_wait_s": 0.05 * spent["wall_s"], "peak_flops_measured": 1e11}
    (folder / "flops.json").write_text(json.dumps(spent))
    (folder / "run.json").write_text(json.dumps({"data_fingerprint": "f" * 64, "precision": "fp32", "config": {}}))


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("planted")
    return out, make_study(out)


@pytest.fixture
def noisy(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """One arm with ten times the noise, and sizes so close that a corner can decide an exponent."""
    return tmp_path, make_study(tmp_path, arms=("late",), noise=0.02, widths=(16, 24, 36, 56))
