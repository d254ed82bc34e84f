"""The rows of `published.laws()` that do not come from the study: language-model laws and the mixtures follow-up."""

from __future__ import annotations

import math
from collections.abc import Iterator

from isofusion.laws.published import Published

HOFFMANN = "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models (Chinchilla), arXiv 2203.15556"
_TEXT = "cross-entropy on MassiveText, nats per token"
_N = "N: all parameters; D: tokens; C = 6 N D"
_RUNS = "over 400 language models, 70M to 16B parameters, 5B to 500B tokens"
_WIDE = ((70e6, 16e9), (5e9, 500e9))

# of (log E, log A, alpha, log B, beta)
_REFIT_COVARIANCE = (
    (1.9503061247e-04, 2.1082091494e-03, 1.2422270394e-04, 3.5001631429e-03, 1.7080955972e-04),
    (2.1082091494e-03, 6.4362780600e-02, 3.8348929681e-03, -2.4851561813e-02, -1.2468814482e-03),
    (1.2422270394e-04, 3.8348929681e-03, 2.2880642970e-04, -1.5546514715e-03, -7.8046882068e-05),
    (3.5001631429e-03, -2.4851561813e-02, -1.5546514715e-03, 1.6747363523e-01, 8.2015198965e-03),
    (1.7080955972e-04, -1.2468814482e-03, -7.8046882068e-05, 8.2015198965e-03, 4.0190407911e-04),
)


def _chinchilla() -> Iterator[Published]:
    yield Published(
        "chinchilla",
        "Chinchilla, parametric fit as published (rounded)",
        "chinchilla",
        {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28},
        _TEXT,
        _N,
        HOFFMANN,
        "eq. 10 (approach 3)",
        _RUNS,
        *_WIDE,
        printed={"a": 0.46, "b": 0.54},
        caveats=(
            "rounding alpha and beta to two digits biases predictions, and the optimiser had stopped early "
            "(Besiroglu et al. 2024): prefer chinchilla/refit",
            "contradicts the paper's own approaches 1 and 2, which put about 20 tokens per parameter at any budget",
        ),
        checked="the notebook of epoch-research/analyzing-chinchilla at 9225883, which quotes it",
    )
    yield Published(
        "chinchilla/unrounded",
        "Chinchilla, the same fit with the digits of its TeX source",
        "chinchilla",
        {
            "E": math.exp(0.5267228),
            "A": math.exp(6.0073404),
            "alpha": 0.33917084,
            "B": math.exp(6.0179186),
            "beta": 0.2849083,
        },
        _TEXT,
        _N,
        HOFFMANN,
        "TeX source, as quoted by Besiroglu et al.: E, A, B are exp of 0.5267228, 6.0073404, 6.0179186",
        _RUNS,
        *_WIDE,
        printed={"a": 0.46, "b": 0.54},
        caveats=("the optimiser had stopped early (Besiroglu et al. 2024): prefer chinchilla/refit",),
        checked="the notebook of epoch-research/analyzing-chinchilla at 9225883",
    )
    how = (
        "covariances recomputed here: 4,000 row resamples of Epoch's 240 points refitted with this project's solver, a "
        "normal approximation in (log E, log A, alpha, log B, beta)"
    )
    yield Published(
        "chinchilla/refit",
        "Chinchilla's data refitted by Besiroglu et al.",
        "chinchilla",
        {"E": 1.81686, "A": 482.00572, "alpha": 0.34781, "B": 2085.43420, "beta": 0.36585},
        _TEXT,
        _N,
        "Besiroglu et al. 2024, Chinchilla Scaling: A Replication Attempt, arXiv 2404.10102",
        "point estimate, with the digits of their notebook; standard errors: 4,000 bootstraps there",
        "240 runs read off Fig. 4 of Hoffmann et al., five outliers left out; 57M to 16B parameters",
        (57.3e6, 16.2e9),
        (2.45e8, 3.18e11),
        (1.4e18, 1.3e22),
        derived={"covariance": how},
        errors={"E": 0.02566, "A": 124.52232, "alpha": 0.01540, "B": 1293.28410, "beta": 0.02060},
        errors_note=how,
        covariance=_REFIT_COVARIANCE,
        printed={"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658},
        caveats=(
            "the point estimate is the least-absolute-residual limit of the Huber fit; the Huber minimum at delta 1e-3 "
            "is E 1.81722, A 477.83, alpha 0.34731, B 2143.42, beta 0.36717",
            "with the five outliers the optimum at Chinchilla's budget moves from 18 to 7 tokens per parameter",
            "rows resampled as if independent: the interval is a lower bound on the uncertainty",
        ),
        checked="the stored output of the authors' notebook; recomputed on their points",
    )


def _others() -> Iterator[Published]:
    yield Published(
        "muennighoff2023",
        "data-constrained: repeated tokens and excess parameters are worth less",
        "repetition",
        {
            "E": math.exp(0.6254804),
            "A": math.exp(6.255414),
            "alpha": 0.3526596,
            "B": math.exp(7.3049974),
            "beta": 0.3526596,
            "R_D": 15.387756,
            "R_N": 5.309743,
        },
        "validation cross-entropy on C4, nats per token",
        "N: all parameters; D: tokens seen; U: unique tokens; C = 6 N D",
        "Muennighoff et al. 2023, Scaling Data-Constrained Language Models, arXiv 2305.16264",
        "eq. 5, 6 and App. A (printed as 521, 1488, 1.87, 0.35; digits: exp of 6.255414, 7.3049974, 0.6254804)",
        "182 runs, 7M to 8.7B parameters, 100M to 178B unique tokens, up to 900B seen",
        (7.1e6, 8.67e9),
        (1e8, 9e11),
        caveats=(
            "R_D and R_N are not the optimum of their objective: (95.4, 1.71) is lower, and the profile of R_D is flat "
            "from 12 to 200 on the same 182 runs",
            "more epochs or parameters never hurt in this form; runs where they did were left out of the fit",
        ),
        checked="the objective of the authors' 182 points at these values (0.0158259353) comes out to 1e-9",
    )
    fits = {
        "c4": ("C4", (1.51, 141.0, 190.0, 0.121)),
        "redpajama": ("RedPajama", (1.84, 212.0, 367.0, 0.136)),
        "refinedweb": ("RefinedWeb", (1.73, 157.0, 246.0, 0.127)),
    }
    for key, (data, (E, a, b, eta)) in fits.items():
        yield Published(
            f"gadre2024/{key}",
            f"over-training: loss against compute and D/N, trained on {data}",
            "over-training",
            {"E": E, "a": a, "b": b, "eta": eta},
            "cross-entropy on the C4 validation set, nats per token",
            "N: all parameters; D: tokens; C = 6 N D; M = D/N",
            "Gadre et al. 2024, Language models scale reliably with over-training and on downstream tasks, 2403.08540",
            "eq. 4 and its table of fits",
            "fitted to 5 runs (11M to 411M parameters at M = 20, 11M at M = 320); tested on 104, to 6.9B",
            (10.6e6, 6.9e9),
            (2.1e8, 9e11),
            caveats=(
                "four parameters on five runs, so no uncertainty could be estimated",
                "three printed digits: rounding puts it up to 1.5 % off the runs it was fitted to",
                "alpha = beta by construction, so D/N at the optimum is the same at every budget",
                "unreliable at M = 5 (the paper)",
            ),
            checked="refitted here to the authors' released losses: the printed digits come out",
        )
    yield Published(
        "abnar2025",
        "experts: loss against total parameters, tokens and sparsity",
        "sparsity",
        {
            "E": 0.94,
            "A": 16612.50,
            "alpha": 0.5962,
            "B": 5455.67,
            "beta": 0.3954,
            "C": 0.4598,
            "lambda": -0.1666,
            "d": 17.26,
            "delta": 0.1603,
            "gamma": 0.1595,
        },
        "cross-entropy, nats per token",
        "N: total parameters; S: inactive over all experts; D: tokens",
        "Abnar et al. 2025, Parameters vs FLOPs: Scaling Laws for Optimal Sparsity, arXiv 2501.12370",
        "eq. 6 and Table 3",
        "isoFLOP surfaces over N and S; the sizes and token counts were not found in what could be read",
        caveats=(
            "R2 falls from 99 % on the fit to 68 % at the held-out sparsity 0.98",
            "lambda < 0: the term C/(1-S)^lambda falls as S rises",
        ),
        checked="two independent copies of Table 3",
    )
    routed = {
        "s-base": ("S-BASE routing", (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478), "937B"),
        "rl-r": ("reinforcement-learned routing", (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982), "85B"),
        "hash": ("hash layers", (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741), "83B"),
    }
    for key, (what, (a, b, c, d, start, top), cut) in routed.items():
        yield Published(
            f"clark2022/{key}",
            f"routed language models, {what}: loss against size and number of experts",
            "routed",
            {"a": a, "b": b, "c": c, "d": d, "E_start": start, "E_max": top},
            "validation cross-entropy, nats per token",
            "N: parameters of the dense model (what a token meets); X: experts",
            "Clark et al. 2022, Unified Scaling Laws for Routed Language Models, arXiv 2202.01169",
            "eq. 1 and Table 3; logarithms to base 10",
            "models from about 15M parameters, up to 512 experts, all at 130B tokens",
            None,
            (130e9, 130e9),
            caveats=(
                f"one token budget (130B); routing stops helping at N = {cut} there",
                "three digits: a unit in the last place of a is 2 % of the loss at 1e9 parameters",
            ),
            checked="one public copy of Table 3; base 10 follows from the printed dense law (within 2 % at one expert)",
        )
    for key, what in (("additive", "optimum independent of scale"), ("joint", "optimum moves with N and D")):
        yield Published(
            f"shukor2025mix/{key}",
            f"data mixtures, {key} law: {what}",
            "mixture",
            {},
            "validation loss of one target domain",
            "N: parameters; D: tokens; h: shares of the training domains, summing to 1",
            "Shukor et al. 2025, Scaling Laws for Optimal Data Mixtures, arXiv 2507.09404v2",
            f"eq. 2.{4 if key == 'additive' else 5}; mean relative errors on held-out mixtures from its tables",
            "native multimodal: 127 mixtures, 1,062 points, 106M to 932M parameters, 20B to 100B tokens; tested at 8B",
            (106e6, 932e6),
            (20e9, 100e9),
            printed=(
                {"MRE_caption_%": 0.95, "MRE_interleaved_%": 0.48, "MRE_text_%": 0.44}
                if key == "additive"
                else {"MRE_caption_%": 0.95, "MRE_interleaved_%": 0.42, "MRE_text_%": 0.37}
            ),
            caveats=(
                "the fitted coefficients are not in what could be read, so nothing can be predicted from this row; fit "
                "your own: isofusion plan --mixtures",
                "about 10 mixtures are needed for 3 domains, about 20 for 6 to 8 (the paper)",
                "every share was at least 0.1 in its grid; no repetition, pretraining loss only",
            ),
            checked="form and errors read in the paper",
            fusion="early",
        )


def collect() -> Iterator[Published]:
    """Chinchilla and its refit, data-constrained, over-training, experts, mixtures."""
    yield from _chinchilla()
    yield from _others()
