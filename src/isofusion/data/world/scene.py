"""Scenes and their pixels: glyphs on a 3 x 3 grid, a bar above and one below, sometimes a drawn numeral.

Everything the text may speak of is visible: glyphs, the tiles they stand on, the tones of the bars, the numeral.
Jitter, clutter and noise are hidden bytes that no text depends on. Jitter is at most half a glyph cell, so no two
glyphs can look alike and none reaches a bar. A glyph is 5 x 5 cells in white ink on a coloured tile: a centre that is
always on, and around it, like the sails of a windmill, four parts of 2 x 3 cells, one bit a cell. At 48 px a glyph is
10 px and begins 3 or 4 px into its 16 px square, so it always straddles patches of 8 (not aligned), yet alike in all
nine squares: what is learnt in one serves in the others.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from isofusion.data.world.choice import Chooser, Table, table, uniform
from isofusion.data.world.entities import N_PARTS, Entities
from isofusion.data.world.vocab import ABOVE, BELOW, LEFT, MOD, RIGHT
from isofusion.errors import InputError

# the ground is mid-grey, zero after the usual normalisation: what an image says is then most of what a patch carries
TILE_RGB = np.array(
    [(212, 0, 0), (0, 212, 0), (0, 0, 232), (112, 100, 0), (130, 0, 82), (0, 106, 106)], dtype=np.uint8
)  # about equal in r + g + b, so that the white ink stands out alike on any tile
BAR_RGB = np.array([(0, 0, 0), (238, 238, 238)], dtype=np.uint8)  # read out as zero, one
GLYPH_INK = np.array((238, 238, 238), dtype=np.uint8)
SIGN_RGB = np.array((238, 190, 40), dtype=np.uint8)
BACKGROUND, CLUTTER, NOISE = 118, 20, 16  # grey level; most that clutter adds; noise is 0 .. NOISE-1
UNIT = 48  # a glyph cell and a bar are 2 px per UNIT of image side
SAILS = (
    (0, 0, 2, 3),
    (0, 3, 3, 2),
    (3, 2, 2, 3),
    (2, 0, 3, 2),
)  # row, column, height, width of a glyph's parts in cells
DIGITS = ("111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
          "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111")  # fmt: skip

CAPTION_COUNT = table((0.4, 0.25, 0.15, 0.1, 0.06, 0.04))
INTERLEAVED_COUNT = table((0.6, 0.25, 0.15))


@dataclass
class Scene:
    """What one image shows; entities in raster order of their cells."""

    entities: list[int]
    colours: list[int]  # indices of COLOUR_WORDS, all different
    cells: list[int]  # 0..8, rising
    bars: list[int]  # tone of the top and the bottom bar, 0 .. MOD-1
    sign: tuple[int, int] | None  # (digit, cell)
    count: Table  # what the number of entities was drawn from
    signed: Table  # (no sign, sign)
    free_sides: list[int] = field(default_factory=lambda: [0, 1])  # sides the text has not spoken of yet
    called: list[int] = field(default_factory=list)  # entities (places in the list) that have a nickname
    related: list[tuple[int, int]] = field(default_factory=list)  # pairs whose relation the text has told

    def relation(self, a: int, b: int) -> int:
        """Token: where entity b is, seen from entity a; columns decide, rows where columns are equal."""
        return relation(self.cells[a], self.cells[b])


def relation(a: int, b: int) -> int:
    """Token for cell b seen from cell a."""
    (row_a, col_a), (row_b, col_b) = divmod(a, 3), divmod(b, 3)
    if col_a != col_b:
        return LEFT if col_b < col_a else RIGHT
    return ABOVE if row_b < row_a else BELOW


def relation_nats(scene: Scene, a: int, b: int) -> float:
    """-log p of the relation of a and b to a reader of the text alone: given the relations told, cells uniform."""
    told = tuple((x, y, scene.relation(x, y)) for x, y in scene.related)
    return _relation_nats(told, (a, b, scene.relation(a, b)))


@lru_cache(maxsize=4096)
def _relation_nats(told: tuple[tuple[int, int, int], ...], new: tuple[int, int, int]) -> float:
    who = sorted({i for x, y, _ in (*told, new) for i in (x, y)})
    possible = true = 0
    for cells in itertools.permutations(range(9), len(who)):  # the text names entities by colour: none comes first
        at = dict(zip(who, cells, strict=True))
        if all(relation(at[x], at[y]) == token for x, y, token in told):
            possible += 1
            true += relation(at[new[0]], at[new[1]]) == new[2]
    return math.log(possible / true)


def draw_scene(chooser: Chooser, entities: Entities, count: Table, p_sign: float) -> Scene:
    """Entities are independent draws by frequency (one may appear twice); colours and cells differ."""
    choose = chooser.choose
    n = choose(count, "count") + 1
    cells, colours = list(range(9)), list(range(len(TILE_RGB)))
    taken = sorted(cells.pop(choose(uniform(len(cells)), "cell")) for _ in range(n))
    bars = [choose(uniform(MOD), "bar") for _ in range(2)]
    sign, signed = None, table((1 - p_sign, p_sign))
    if choose(signed, "sign"):
        sign = choose(uniform(10), "digit"), cells[choose(uniform(len(cells)), "cell")]
    return Scene(
        entities=[choose(entities.draw, "entity") for _ in range(n)],
        colours=[colours.pop(choose(uniform(len(colours)), "colour")) for _ in range(n)],
        cells=taken,
        bars=bars,
        sign=sign,
        count=count,
        signed=signed,
    )


class Renderer:
    """Precomputed masks for one image size."""

    def __init__(self, image_size: int) -> None:
        if image_size < UNIT:
            raise InputError(f"image_size {image_size} is too small for the world's scenes; use at least {UNIT}")
        self.size = image_size
        self.unit = image_size // UNIT
        self.cell = 2 * self.unit  # px of a glyph cell
        self.bar = 2 * self.unit  # px of a bar
        self.pitch = image_size // 3
        masks = np.zeros((len(SAILS), N_PARTS, 5, 5), bool)
        masks[0, :, 2, 2] = True
        bits = np.arange(N_PARTS)[:, None] >> np.arange(6) & 1 == 1
        for part, (y, x, h, w) in enumerate(SAILS):
            masks[part, :, y : y + h, x : x + w] = bits.reshape(-1, h, w)
        self.parts = self._scaled(masks)  # bool[4, 64, side, side, 1]; the centre belongs to the first part
        self.digits = self._scaled(np.array([[c == "1" for c in d] for d in DIGITS]).reshape(10, 5, 3))
        self.n_hidden = 64 + image_size * image_size * 3

    def _scaled(self, masks: np.ndarray) -> np.ndarray:
        return masks.repeat(self.cell, -2).repeat(self.cell, -1)[..., None]

    def corner(self, cell: int) -> tuple[int, int]:
        """(y, x) of a square's glyph before jitter, in px."""
        return 3 * self.unit + cell // 3 * self.pitch, 3 * self.unit + cell % 3 * self.pitch

    def _jitter(self, byte: int) -> int:
        """0 px in three cases of four, else 1 px to half a glyph cell."""
        return 0 if byte & 3 else 1 + (byte >> 2) % self.unit

    def render(self, scene: Scene, parts: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """u8[size, size, 3] from the scene, the glyph parts u8[n, 4] and `n_hidden` hidden bytes."""
        size, bar, side, unit = self.size, self.bar, 5 * self.cell, self.unit
        out = np.full((size, size, 3), BACKGROUND, np.uint8)
        bits = hidden[:64].tolist()
        for c in range(3):  # clutter: faint boxes
            y, x, h, w, level, channel = bits[c * 6 : c * 6 + 6]
            y, x = y * size >> 8, x * size >> 8
            out[y : y + 2 + (h * size >> 10), x : x + 2 + (w * size >> 10), channel % 3] += level * CLUTTER >> 8
        for i, (four, colour, cell) in enumerate(zip(parts.tolist(), scene.colours, scene.cells, strict=True)):
            y, x = self.corner(cell)
            y, x = y + self._jitter(bits[24 + 2 * i]), x + self._jitter(bits[25 + 2 * i])
            a, b, c, d = four
            mask = self.parts[0, a] | self.parts[1, b] | self.parts[2, c] | self.parts[3, d]
            out[y - unit : y + side + unit, x - unit : x + side + unit] = TILE_RGB[colour]
            np.copyto(out[y : y + side, x : x + side], GLYPH_INK, where=mask)
        if scene.sign is not None:
            y, x = self.corner(scene.sign[1])
            y, x = y + self._jitter(bits[40]), x + self.cell + self._jitter(bits[41])
            mask = self.digits[scene.sign[0]]
            np.copyto(out[y : y + mask.shape[0], x : x + mask.shape[1]], SIGN_RGB, where=mask)
        out[:bar], out[size - bar :] = BAR_RGB[scene.bars]
        out += (hidden[64:] % NOISE).reshape(out.shape)
        return out
