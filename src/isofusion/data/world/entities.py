"""The entities: 2^bits of them, Zipf-frequent, each with a name, a glyph and a place in a class tree (docs/world.md).

Names and glyphs are bijections (alternating Feistel networks over hashes of the world's seed), so a name says nothing
about the glyph beyond what was seen together, and both are injective. The first part of a glyph is the leaf of a
4 x 4 x 4 tree, which decides kind (top), home (middle) and food (leaf): structure to generalise over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from isofusion.config import WorldConfig
from isofusion.data.world.choice import Table
from isofusion.data.world.vocab import FOOD_WORDS, HOME_WORDS, SYLLABLE, TRAIT_VALUES

# K entities; a name is 3 syllables of 128, a glyph 4 parts of 64
N_SYLLABLES, N_PARTS, LEAVES = 128, 64, 64
NAME_BITS, GLYPH_BITS, TAIL_BITS, LEAF_BITS = 21, 20, 18, 6
ROUNDS, CHUNK = 4, 1 << 14  # Feistel rounds; numbers hashed at once, so that they stay in the cache
NAME_NATS = 3 * math.log(N_SYLLABLES)
"""log(128^3): nats of a name to someone who knows nothing about it."""


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014) on u64, wrapping."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(seed: int, purpose: int, n: int) -> np.ndarray:
    """u64[n]: round keys, a function of the world's seed and a purpose number."""
    return np.asarray(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)).random_raw(n))


def feistel(x: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2^bits): alternately xor one half with a hash of the other (halves may differ by a bit)."""
    low = bits // 2
    low_mask, high_mask, shift = np.uint64((1 << low) - 1), np.uint64((1 << (bits - low)) - 1), np.uint64(low)
    out = np.empty_like(x)
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        lo, hi = part & low_mask, part >> shift
        for i, key in enumerate(round_keys):
            if i % 2 == 0:
                hi = hi ^ (mix64(lo + key) & high_mask)
            else:
                lo = lo ^ (mix64(hi + key) & low_mask)
        out[start : start + CHUNK] = hi << shift | lo
    return out


@dataclass(frozen=True)
class Entities:
    """Tables over all K entities, entity 0 the most frequent."""

    p: np.ndarray  # f64[K], sums to 1, falling
    names: np.ndarray  # i16[K, 3] syllable numbers
    parts: np.ndarray  # u8[K, 4] glyph parts; parts[:, 0] is the leaf
    name_nats: np.ndarray  # f32[K, 3]: -log p(syllable | the syllables before), entity drawn by p
    traits: list[tuple[int, int, int]]  # per leaf: token ids of kind, home, food
    draw: Table

    def name_tokens(self, k: int) -> list[int]:
        return [SYLLABLE + s for s in self.names[k].tolist()]

    def trait_tokens(self, k: int) -> tuple[int, int, int]:
        """Token ids of what entity k is, where it lives, what it eats."""
        return self.traits[int(self.parts[k, 0])]


def build(cfg: WorldConfig) -> Entities:
    """The tables of one world; cached, because 2^20 entities take a fraction of a second."""
    return _build(cfg.seed, cfg.entity_bits, cfg.zipf)


def _columns(dtype: type, *columns: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.empty((len(columns[0]), len(columns)), dtype)
    for i, column in enumerate(columns):
        out[:, i] = column
    return out


@lru_cache(maxsize=4)
def _build(seed: int, bits: int, zipf: float) -> Entities:
    n = 1 << bits
    k = np.arange(n, dtype=np.uint64)
    log_p = -zipf * np.log(np.arange(1, n + 1, dtype=np.float64))
    p = np.exp(log_p)
    total = p.sum()
    p /= total
    log_p -= np.log(total)

    code = feistel(k, NAME_BITS, keys(seed, 1, ROUNDS)).astype(np.int32)
    pair = code >> 7
    first = pair >> 7
    names = _columns(np.int16, first, pair & 127, code & 127)
    place = feistel(k, GLYPH_BITS, keys(seed, 2, ROUNDS))
    tail = feistel(place >> np.uint64(LEAF_BITS), TAIL_BITS, keys(seed, 3, ROUNDS)).astype(np.int32)
    parts = _columns(np.uint8, place & np.uint64(63), tail >> 12, tail >> 6 & 63, tail & 63)

    with np.errstate(divide="ignore"):  # no entity has a syllable of zero mass
        log_first = np.log(np.bincount(first, p, N_SYLLABLES))[first]
        log_pair = np.log(np.bincount(pair, p, N_SYLLABLES**2))[pair]
    name_nats = _columns(np.float32, -log_first, log_first - log_pair, log_pair - log_p)

    rng = keys(seed, 4, LEAVES + LEAVES // 4)
    foods = np.argsort(rng[:LEAVES], kind="stable") % len(FOOD_WORDS)  # balanced: four leaves a food
    homes = np.argsort(rng[LEAVES:], kind="stable") % len(HOME_WORDS)
    kinds_, homes_, foods_ = TRAIT_VALUES
    traits = [(kinds_[leaf >> 4], homes_[int(homes[leaf >> 2])], foods_[int(foods[leaf])]) for leaf in range(LEAVES)]
    cum = np.cumsum(p)[:-1]
    return Entities(
        p=p,
        names=names,
        parts=parts,
        name_nats=np.maximum(name_nats, 0, out=name_nats),
        traits=traits,
        draw=Table(p, cum, ()),
    )
