"""Text documents: sentences of a rule grammar, facts on the entities of the images, and small arithmetic.

The rule grammar is an order-2 Markov source over the lexicon. Each context ranks its candidate words by an exponential
race whose rates are Zipfian per word and tilted by the previous word, so unigrams, then bigrams, then ever rarer
trigram contexts can be learnt one after another; the rank alone decides the probability, so every context has the same
entropy.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from isofusion.data.world.choice import Table, table
from isofusion.data.world.document import Document
from isofusion.data.world.entities import keys, mix64
from isofusion.data.world.vocab import (
    AFTER,
    AND,
    CHOICE,
    GRAMMAR,
    LEXICON,
    LEXICON_SIZE,
    MOD,
    NUMERAL,
    NUMERALS,
    RULE,
    STOP,
    SUM,
)

RULE_NATS = 1.8  # entropy of the next word; ends of sentences bring a rule token to about 2 nats
CANDIDATES = 16
WORD_ZIPF = 1.1  # word frequencies
TILT = 2.5  # how strongly the previous word alone decides
MIN_WORDS, MAX_WORDS, P_STOP = 5, 24, 0.12
MIN_LEN = 40  # slots incl. BOS before a document may end
P_END = 0.14  # chance to end after each later sentence
KIND = (0.58, 0.32, 0.05, 0.05)  # rule, fact, sum, after
GO_ON = table((1 - P_STOP, P_STOP))
SECOND_FACT = table((0.65, 0.35))


def _entropy(probs: np.ndarray) -> float:
    return float(-(probs * np.log(probs)).sum())


@lru_cache(maxsize=1)
def profile() -> Table:
    """Probabilities of the ranks, falling as a power whose exponent gives exactly RULE_NATS."""
    rank = np.arange(1, CANDIDATES + 1, dtype=np.float64)
    lo, hi = 0.0, 8.0
    for _ in range(80):
        mid = (lo + hi) / 2
        probs = rank**-mid / (rank**-mid).sum()
        lo, hi = (mid, hi) if _entropy(probs) > RULE_NATS else (lo, mid)
    return table(tuple(probs.tolist()))


class Rules:
    """Candidate words of each context, worked out when first met."""

    def __init__(self, seed: int) -> None:
        w = LEXICON_SIZE
        self._key, tilt_key = keys(seed, 6, 2)
        self._word = np.arange(w, dtype=np.uint64)
        base = np.arange(1, w + 1, dtype=np.float64) ** -WORD_ZIPF
        cell = np.arange((w + 1) * w, dtype=np.uint64)
        tilt = self._uniform(cell + tilt_key).reshape(w + 1, w)
        self._rate = base * np.exp(TILT * (2 * tilt - 1))  # [previous word, word]
        self._seen: dict[int, list[int]] = {}

    @staticmethod
    def _uniform(x: np.ndarray) -> np.ndarray:
        return ((mix64(mix64(x)) >> np.uint64(11)) + 0.5) * 2.0**-53

    def candidates(self, a: int, b: int) -> list[int]:
        """Token ids by falling probability after words a, b (numbers in the lexicon; LEXICON_SIZE = sentence start)."""
        context = a * (LEXICON_SIZE + 1) + b
        found = self._seen.get(context)
        if found is None:
            u = self._uniform(self._word + np.uint64(context * LEXICON_SIZE) + self._key)
            race = -np.log(u) / self._rate[b]
            found = self._seen[context] = (LEXICON + np.argsort(race, kind="stable")[:CANDIDATES]).tolist()
        return found


LONGEST_SENTENCE = MAX_WORDS + 1


def write_text(doc: Document, rules: Rules) -> None:
    """Sentences until the end is drawn, certain when the next might not fit; the first word tells the kind."""
    start = doc.room
    while True:
        written = start - doc.room + 1
        end = 0.0 if written < MIN_LEN else P_END
        if doc.room < LONGEST_SENTENCE:
            end = 1.0
        kind = doc.defer(table((end, *((1 - end) * p for p in KIND))))
        if kind == 0:
            return
        (_rule, _fact, _sum, _after)[kind - 1](doc, rules)


def _rule(doc: Document, rules: Rules) -> None:
    a = b = LEXICON_SIZE
    dist = profile()
    for n in range(MAX_WORDS):
        if n >= MIN_WORDS and doc.defer(GO_ON):
            break
        tokens = rules.candidates(a, b)
        i = doc.chooser.choose(dist, "rule")
        doc.put(tokens[i], RULE, dist.nats[i])
        a, b = b, tokens[i] - LEXICON
    doc.put(STOP, RULE)


def _fact(doc: Document, rules: Rules) -> None:
    k = doc.draw_name()
    which = [0, 1, 2]
    doc.trait(k, which.pop(doc.defer(table((1.0, 1.0, 1.0)))))
    if doc.defer(SECOND_FACT):
        doc.put(AND, GRAMMAR)
        doc.trait(k, which.pop(doc.defer(table((1.0, 1.0)))))
    doc.put(STOP, GRAMMAR)


def _sum(doc: Document, rules: Rules) -> None:
    """`sum one one zero`: addition mod m, the same table that the questions about bars need."""
    doc.put(SUM, GRAMMAR)
    a = doc.pick(NUMERALS[:MOD], CHOICE)
    b = doc.pick(NUMERALS[:MOD], CHOICE)
    doc.put(NUMERALS[(a + b) % MOD], NUMERAL)
    doc.put(STOP, GRAMMAR)


def _after(doc: Document, rules: Rules) -> None:
    """`after six seven`: the numerals that signs show, in order."""
    doc.put(AFTER, GRAMMAR)
    a = doc.pick(NUMERALS, CHOICE)
    doc.put(NUMERALS[(a + 1) % 10], NUMERAL)
    doc.put(STOP, GRAMMAR)


def entropy_per_rule_word() -> float:
    """Nats, the choice of word alone; equal in every context."""
    return math.fsum(p * n for p, n in zip(profile().probs, profile().nats, strict=True))
