"""The paper's model family by closed form: which width and depth come nearest to a number of parameters.

Counting as arXiv 2504.07951 does it (its sizes come out of N = L (4 d^2 + 3 d h(d)) + 2 V d with L = 24, V = 50,432,
h(d) = 256 ceil(int(8 d / 3) / 256); late fusion adds an encoder of the same blocks). Norms and the patch projection
(under 0.3 %) are left out, as in the paper's labels; `isofusion count` has the exact numbers. No imports beyond the
standard library: `isofusion plan` starts in a fraction of a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

DEPTH = 24
VOCABULARY = 50_432
STEP = 32  # every width of the paper is a multiple
WIDTHS = (256, 16_384)  # narrower, the embedding is nearly everything; wider is far beyond any law here
EARLY = (800, 1088, 1632, 2208, 2624, 3232)  # Table 6; also the expert models
LATE = ((384, 768), (512, 1024), (768, 1536), (1024, 2048), (1184, 2464), (1536, 3072))  # encoder, decoder
IMAGE_SHARE = 0.544  # D_v = 0.544 D for the mixture 45-45-10 (App. C.2)


def hidden(width: int) -> int:
    """Width of the SwiGLU feed-forward layer."""
    return 256 * math.ceil(int(8 * width / 3) / 256)


def blocks(width: int, experts: int = 1) -> int:
    """Parameters of the 24 blocks, with `experts` feed-forward layers each."""
    return DEPTH * (4 * width * width + experts * 3 * width * hidden(width))


def decoder(width: int, experts: int = 1) -> int:
    """Parameters of a decoder with input embedding and untied head."""
    return blocks(width, experts) + 2 * VOCABULARY * width


@cache
def encoder_line() -> tuple[float, float]:
    """(p, q) of N_v = p + q N over the paper's six late-fusion sizes, N = N_v + N_t (regression as in App. C.2)."""
    points = [(blocks(e) + decoder(d), blocks(e)) for e, d in LATE]
    mean_n, mean_v = (sum(v) / len(points) for v in zip(*points, strict=True))
    q = sum((n - mean_n) * (v - mean_v) for n, v in points) / sum((n - mean_n) ** 2 for n, _ in points)
    return mean_v - q * mean_n, q


def per_token(n: float, late: bool = False, image_share: float = IMAGE_SHARE) -> float:
    """Training FLOPs per token: 6 N, or for late fusion 6 (f N_v + N_t) with N_v regressed on N (App. C.2)."""
    if not late:
        return 6.0 * n
    p, q = encoder_line()
    idle = 1.0 - image_share  # share of tokens that never pass the encoder
    return 6.0 * (n - idle * min(max(p + q * n, 0.0), n))


def late_slope(n: float, late: bool = False, image_share: float = IMAGE_SHARE) -> float:
    """d log k / d log N of `per_token`."""
    if not late:
        return 1.0
    step = 1e-4
    return math.log(per_token(n * (1 + step), True, image_share) / per_token(n * (1 - step), True, image_share)) / (
        math.log1p(step) - math.log1p(-step)
    )


@dataclass(frozen=True)
class Shape:
    """A model of the family. `parameters` as the law counts N (late: N_v + N_t; experts: active)."""

    fusion: str
    depth: int
    width: int
    encoder_width: int | None
    parameters: int
    total: int  # with every expert
    off: float  # parameters over the wanted number, minus 1
    trained: bool  # one of the paper's own sizes

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def nearest(n: float, fusion: str = "early") -> Shape | None:
    """The family's model nearest to n parameters (in the logarithm), or None where the family does not reach.

    fusion: "early", "late" (encoder half as wide, as in Table 6) or "experts" (8 per block, one active; n active).
    """
    if fusion == "late":
        sizes = [(e, d) for d in range(WIDTHS[0], WIDTHS[1] + 1, 2 * STEP) for e in (d // 2,)]
        sizes += [pair for pair in LATE if pair not in sizes]
    else:
        sizes = [(0, d) for d in range(WIDTHS[0], WIDTHS[1] + 1, STEP)]

    def count(pair: tuple[int, int]) -> int:
        return (blocks(pair[0]) if pair[0] else 0) + decoder(pair[1])

    best = min(sizes, key=lambda pair: abs(math.log(count(pair) / n)))
    found = count(best)
    if abs(math.log(found / n)) > math.log(1.1):
        return None
    total = decoder(best[1], 8) if fusion == "experts" else found
    own = best in LATE if fusion == "late" else best[1] in EARLY
    return Shape(fusion, DEPTH, best[1], best[0] or None, found, total, found / n - 1.0, own)
