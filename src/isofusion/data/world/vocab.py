"""The world's 512 words, its tokenizer, and the classes its tokens are reported in (docs/world.md).

One word is one token, so the entropy of a document is known exactly. The layout is fixed: it does not depend on a seed.
"""

from __future__ import annotations

import hashlib

import numpy as np

from isofusion.errors import InputError

VOCAB_SIZE = 512
PAD, BOS, EOS, IMAGE = range(4)

CLASSES = (
    "unclassified",
    "grammar",  # words that the structure of the document decides, and optional parts
    "lookup",  # name syllables read off a glyph, first mention in the document
    "spatial",  # above, below, left, right of
    "count",  # how many entities
    "attribute",  # what an entity is, eats, where it lives
    "fusion-after",  # (tone of a bar + operand) mod m, asked after the image
    "fusion-before",  # the same, asked before the image
    "name",  # entity names in text: the Zipf entropy
    "rule",  # the text grammar
    "numeral",  # drawn numerals read out, sums and successors in text
    "reference",  # repeated names, answers that point back at a question
    "choice",  # what the writer picks freely: operands, sides, nicknames
    "colour",  # colours of tiles: which entity comes next
    "tone",  # the tone of a bar, read out as a numeral; answers to questions that add nothing to it
)
"""Index = the code in `token_class`."""
(_, GRAMMAR, LOOKUP, SPATIAL, COUNT, ATTRIBUTE, FUSION_AFTER, FUSION_BEFORE, NAME, RULE, NUMERAL, REFERENCE, CHOICE,
 COLOUR, TONE) = range(len(CLASSES))  # fmt: skip

SYLLABLE_WORDS = tuple(c + v for c in "bdfghjklmnprstvz" for v in ("a", "e", "i", "o", "u", "ai", "au", "oi"))
COLOUR_WORDS = ("red", "green", "blue", "brown", "plum", "teal")
MOD = 2  # tones of a bar, and m of the fusion questions: (tone + operand) mod m
NUMERAL_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINAL_WORDS = ("first", "second", "third", "fourth")
SIDE_WORDS = ("top", "bottom")
KIND_WORDS = ("beast", "bird", "reptile", "insect")
HOME_WORDS = ("forest", "river", "desert", "cave", "meadow", "marsh", "cliff", "shore")
FOOD_WORDS = ("berries", "seeds", "roots", "leaves", "nuts", "grass", "moss", "fruit",
              "honey", "crabs", "worms", "snails", "eggs", "flies", "mice", "algae")  # fmt: skip
NICKNAME_WORDS = ("zum", "kip", "dax", "lorp", "vex", "fenn", "quill", "brog")


def _lexicon(n: int) -> tuple[str, ...]:
    """n pronounceable words without meaning, spread over the possible spellings."""
    onsets = ("bl", "br", "cl", "cr", "dr", "fl", "gl", "gr", "pl", "pr", "sk", "sl",
              "sm", "sn", "sp", "st", "tr", "tw", "sw", "th", "ch", "sh", "wh", "kn")  # fmt: skip
    spellings = [onset + vowel + coda for vowel in "aeiou" for onset in onsets for coda in ("m", "n", "st", "lk")]
    return tuple(spellings[(i * 197) % len(spellings)] for i in range(n))


_FIXED = (
    ("special", ("<pad>", "<bos>", "<eos>", "<image>")),
    ("syllable", SYLLABLE_WORDS),
    ("colour", COLOUR_WORDS),
    ("numeral", NUMERAL_WORDS),
    ("ordinal", ORDINAL_WORDS),
    ("side", SIDE_WORDS),
    ("direction", ("above", "below", "left", "right")),
    ("kind", KIND_WORDS),
    ("home", HOME_WORDS),
    ("food", FOOD_WORDS),
    ("trait", ("is", "lives", "eats")),
    ("nickname", NICKNAME_WORDS),
    ("grammar", (".", "ask", "call", "from", "sign", "rim", "sum", "after", "and")),
)
LEXICON_SIZE = VOCAB_SIZE - sum(len(group) for _, group in _FIXED)
WORDS: tuple[str, ...] = tuple(w for _, group in _FIXED for w in group) + _lexicon(LEXICON_SIZE)
ID = {word: i for i, word in enumerate(WORDS)}

SYLLABLE = ID[SYLLABLE_WORDS[0]]
LEXICON = VOCAB_SIZE - LEXICON_SIZE
COLOURS = [ID[w] for w in COLOUR_WORDS]
NUMERALS = [ID[w] for w in NUMERAL_WORDS]
ORDINALS = [ID[w] for w in ORDINAL_WORDS]
SIDES = [ID[w] for w in SIDE_WORDS]
NICKNAMES = [ID[w] for w in NICKNAME_WORDS]
TRAITS = [ID[w] for w in ("is", "lives", "eats")]
TRAIT_VALUES = [[ID[w] for w in group] for group in (KIND_WORDS, HOME_WORDS, FOOD_WORDS)]
LEFT, RIGHT, ABOVE, BELOW = (ID[w] for w in ("left", "right", "above", "below"))
STOP, ASK, CALL, FROM, SIGN, RIM, SUM, AFTER, AND = (
    ID[w] for w in (".", "ask", "call", "from", "sign", "rim", "sum", "after", "and")
)


class WorldTokenizer:
    """Words to ids and back. `encode(decode(ids))` gives `ids` again; an unknown word raises InputError."""

    vocab_size = VOCAB_SIZE
    pad_id, bos_id, eos_id, image_id = PAD, BOS, EOS, IMAGE
    digest = hashlib.sha256("\n".join(WORDS).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """i32[L]: words are separated by spaces, the syllables of a name by hyphens."""
        words = [part for word in text.split() for part in word.split("-")]
        unknown = [w for w in words if w not in ID]
        if unknown:
            raise InputError(f"the world's vocabulary has no word {unknown[0]!r}; use a BPE tokenizer for other text")
        return np.array([ID[w] for w in words], dtype=np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        out: list[str] = []
        previous = False
        for i in ids:
            syllable = SYLLABLE <= int(i) < SYLLABLE + len(SYLLABLE_WORDS)
            if syllable and previous:
                out[-1] += "-" + WORDS[int(i)]
            else:
                out.append(WORDS[int(i)])
            previous = syllable
        return " ".join(out)

    def n_bytes(self, ids: np.ndarray) -> int | None:
        """None: bits per byte mean nothing for words whose spelling is arbitrary."""
        return None
