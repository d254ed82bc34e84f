"""Where tokens go: text and image tokens per expert, and how specialised experts are by modality.

Scores of arXiv 2504.07951: section 4.4 (1 - binary entropy of an expert's text/image split, mean over experts) and
App. E.2 (mean distance of an expert's share of a modality from 1/E). The first is not corrected for the base rate: with
90 % image tokens even random routing scores 0.53. `corrected_specialisation` normalises each modality to 1 first, so
routing that ignores modality scores 0 whatever the mixture. L layers, E experts; counts are tokens.
"""

from __future__ import annotations

import numpy as np


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in bits of a coin with chance p; 0 at p = 0 and 1."""
    q = np.clip(p, 0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, -x * np.log2(x), 0.0) for x in (q, 1.0 - q)]
    return terms[0] + terms[1]


def _mean_over_used(text_LE: np.ndarray, image_LE: np.ndarray) -> np.ndarray:
    """Mean over experts of 1 - H(p), p the text share; experts that got nothing are left out; NaN if none got any."""
    total_LE = text_LE + image_LE
    used_LE = total_LE > 0
    p_LE = text_LE / np.where(used_LE, total_LE, 1.0)
    score_LE = np.where(used_LE, 1.0 - binary_entropy(p_LE), 0.0)
    n_L = used_LE.sum(-1)
    return np.where(n_L > 0, score_LE.sum(-1) / np.maximum(n_L, 1), np.nan)


def specialisation(text_LE: np.ndarray, image_LE: np.ndarray) -> np.ndarray:
    """f64[L] in [0, 1]: the paper's score (section 4.4), from raw token counts."""
    return _mean_over_used(np.asarray(text_LE, float), np.asarray(image_LE, float))


def corrected_specialisation(text_LE: np.ndarray, image_LE: np.ndarray) -> np.ndarray:
    """f64[L] in [0, 1]: the same from shares of each modality, so that modality-blind routing scores 0."""
    return _mean_over_used(_shares(text_LE), _shares(image_LE))


def modality_specialisation(counts_LE: np.ndarray) -> np.ndarray:
    """f64[L]: mean over experts of |share of this modality's tokens - 1/E| (App. E.2); NaN without tokens."""
    shares_LE = _shares(counts_LE)
    distance_L = np.abs(shares_LE - 1.0 / shares_LE.shape[-1]).mean(-1)
    return np.where(np.asarray(counts_LE).sum(-1) > 0, distance_L, np.nan)


def _shares(counts_LE: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts_LE, float)
    total = counts.sum(-1, keepdims=True)
    return counts / np.where(total > 0, total, 1.0)
