"""The world as a source: injective names and glyphs, determinism, visible pixels, length cap, learner's bound."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from isofusion.config import WorldConfig
from isofusion.data.sample import DOMAINS, Image
from isofusion.data.world import World, bound, captions, interleaved
from isofusion.data.world.choice import Chooser
from isofusion.data.world.scene import (
    BACKGROUND,
    BAR_RGB,
    CAPTION_COUNT,
    GLYPH_INK,
    INTERLEAVED_COUNT,
    NOISE,
    SAILS,
    SIGN_RGB,
    TILE_RGB,
    draw_scene,
)
from isofusion.data.world.vocab import (
    COLOUR_WORDS,
    FUSION_AFTER,
    FUSION_BEFORE,
    LEXICON,
    LEXICON_SIZE,
    MOD,
    NICKNAME_WORDS,
    NUMERAL_WORDS,
    ORDINAL_WORDS,
    SIDE_WORDS,
    SYLLABLE_WORDS,
    TONE,
    WORDS,
    WorldTokenizer,
)
from isofusion.errors import InputError


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig())


def digest(sample) -> str:
    h = hashlib.sha256(repr((sample.key, sample.meta)).encode())
    for s in sample.segments:
        for a in [s.pixels] if isinstance(s, Image) else [s.ids, s.token_class, s.oracle]:
            h.update(a.tobytes())
    return h.hexdigest()


def words_of(sample) -> list[str]:
    return [
        w
        for s in sample.segments
        for w in (["[image]"] if isinstance(s, Image) else [WORDS[i] for i in s.ids.tolist()])
    ]


def test_names_and_glyphs_are_injective_over_all_entities(world):
    e = world.entities
    n = 1 << 20
    names = e.names.astype(np.int64) @ (128**2, 128, 1)
    glyphs = e.parts.astype(np.int64) @ (64**3, 64**2, 64, 1)
    assert len(np.unique(names)) == len(np.unique(glyphs)) == n
    assert names.max() < 128**3
    assert glyphs.max() < 64**4
    leaves = np.bincount(e.parts[:, 0], minlength=64)
    assert leaves.min() == leaves.max() == n // 64  # classes are equally large


def test_names_say_nothing_about_the_class(world):
    counts = np.zeros((128, 64))
    np.add.at(counts, (world.entities.names[:, 0], world.entities.parts[:, 0]), 1)
    expected = counts.mean()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    cells = 127 * 63
    assert abs(chi2 - cells) < 6 * math.sqrt(2 * cells)


def test_structure_and_documents_depend_on_seed_and_arguments_only(world):
    calls = [(s, d, b, i) for s in (0, 7) for d in DOMAINS for b in (0, 3) for i in (0, 5)]
    forward = [digest(world.sample(*c)) for c in calls]
    other = World(WorldConfig())
    assert [digest(other.sample(*c)) for c in reversed(calls)] == forward[::-1]
    assert len(set(forward)) == len(calls)
    assert digest(World(WorldConfig(seed=1)).sample(*calls[0])) != forward[0]


def test_another_process_writes_the_same_document(world):
    code = (
        "from isofusion.config import WorldConfig; from isofusion.data.world import World;"
        "print(World(WorldConfig(entity_bits=8)).sample(2, 'caption', 1, 4).segments[-1].ids.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = World(WorldConfig(entity_bits=8)).sample(2, "caption", 1, 4)
    assert out.strip() == str(here.segments[-1].ids.tolist())


def test_vocabulary_and_tokenizer(world):
    tok = WorldTokenizer()
    assert len(set(WORDS)) == tok.vocab_size == 512
    for d in DOMAINS:
        for s in world.sample(0, d, 0, 1).segments:
            if not isinstance(s, Image):
                np.testing.assert_array_equal(tok.encode(tok.decode(s.ids)), s.ids)
    assert tok.decode(tok.encode("red ba-be-bi eats mice .")) == "red ba-be-bi eats mice ."
    with pytest.raises(InputError, match="quetzal"):
        tok.encode("red quetzal")


@pytest.mark.parametrize(("size", "patch", "max_len"), [(48, 8, 250), (48, 8, 101), (96, 8, 250), (48, 6, 256)])
def test_documents_fit(size, patch, max_len):
    w = World(WorldConfig(entity_bits=6), size, patch, max_len)
    for d in DOMAINS:
        for i in range(80):
            s = w.sample(0, d, 0, i)
            images = sum(isinstance(x, Image) for x in s.segments)
            texts = sum(len(x.ids) for x in s.segments if not isinstance(x, Image))
            assert 2 + texts + images * w.patches_per_image <= max_len
            assert images >= (d != "text")
            if d == "text":
                assert texts + 2 >= 40
            if d == "interleaved" and (size, patch, max_len) == (48, 8, 250):
                assert 2 <= images <= 4


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="max_len 250"):
        World(WorldConfig(), 224, 14)
    with pytest.raises(InputError, match="too small"):
        World(WorldConfig(), 40, 8)
    with pytest.raises(InputError, match="no domain 'poem'"):
        World(WorldConfig(entity_bits=4)).sample(0, "poem", 0, 0)
    with pytest.raises(InputError, match="negative"):
        World(WorldConfig(entity_bits=4)).sample(-1, "text", 0, 0)


# --- reading the pixels ---------------------------------------------------------------------------------------------


def nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the palette colour (plus mean noise) nearest to each pixel."""
    return ((pixels[..., None, :].astype(int) - (palette.astype(int) + NOISE // 2)) ** 2).sum(-1).argmin(-1)


def read_image(world: World, pixels: np.ndarray):
    """(cells, colours, parts, bars, digit) from pixels alone."""
    r = world._renderer
    bars = []
    for bar in (pixels[: r.bar], pixels[-r.bar :]):
        tones = np.unique(nearest(bar, BAR_RGB))
        assert len(tones) == 1, "a bar has one tone over its whole length"
        bars.append(int(tones[0]))
    palette = np.concatenate([np.full((1, 3), BACKGROUND), TILE_RGB, GLYPH_INK[None], SIGN_RGB[None]])
    ink, sign = len(palette) - 2, len(palette) - 1
    seen = nearest(pixels, palette)
    digits = {tuple(d[:: r.cell, :: r.cell, 0].ravel().tolist()): i for i, d in enumerate(r.digits)}
    cells, colours, parts, digit = [], [], [], None
    glyph = 5 * r.cell
    for cell in range(9):
        y, x = (c - r.unit for c in r.corner(cell))  # where a tile without jitter begins
        square = seen[y : min(y + glyph + 3 * r.unit, r.size - r.bar), x : x + glyph + 3 * r.unit]
        found = set(np.unique(square).tolist()) - {0}
        if not found:
            continue
        if found == {sign}:
            on = square > 0
            matches = []
            for dy in range(r.unit + 1):
                for dx in range(r.unit + 1):
                    grid = on[r.unit + dy :, r.unit + r.cell + dx :][:glyph, : 3 * r.cell]
                    small = grid[:: r.cell, :: r.cell]
                    if (small.repeat(r.cell, 0).repeat(r.cell, 1) == grid).all() and on.sum() == grid.sum():
                        matches.append(digits.get(tuple(small.ravel().tolist())))
            assert len(matches) == 1, "exactly one jitter explains the pixels"
            digit = matches[0]
            continue
        (colour,) = found - {ink}
        rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
        top, left = int(rows[0]), int(columns[0])
        assert max(top, left) <= r.unit, "jitter"
        tile = square[top : top + glyph + 2 * r.unit, left : left + glyph + 2 * r.unit]
        assert tile.all()
        assert tile.astype(bool).sum() == square.astype(bool).sum(), "nothing but the tile is drawn in its square"
        assert tile.shape[1] == glyph + 2 * r.unit
        grid = tile[r.unit : r.unit + glyph, r.unit : r.unit + glyph] == ink
        assert grid.shape == (glyph, glyph), "no bar hides a glyph"
        assert grid.sum() == (square == ink).sum(), "the margin of a tile is not written on"
        small = grid[:: r.cell, :: r.cell]
        assert (small.repeat(r.cell, 0).repeat(r.cell, 1) == grid).all()
        assert small[2, 2]
        sails = (small[a : a + h, b : b + w].ravel() for a, b, h, w in SAILS)
        cells.append(cell)
        colours.append(colour - 1)
        parts.append([int(bits @ (1 << np.arange(6))) for bits in sails])
    return cells, colours, parts, bars, digit


@pytest.mark.parametrize(("size", "patch"), [(48, 8), (96, 16), (100, 10)])
def test_pixels_give_the_whole_scene_away(size, patch):
    w = World(WorldConfig(), size, patch, 256)
    assert w._renderer.bar == w._renderer.cell == 2 * (size // 48)
    jitter = np.array([w._renderer._jitter(byte) for byte in range(256)])
    assert (jitter == 0).sum() == 192
    assert set(jitter.tolist()) == set(range(size // 48 + 1))
    chooser = Chooser(np.random.Philox(key=11))
    read_colours, read_tones, read_digits = set(), set(), set()
    for i in range(200):
        scene = draw_scene(chooser, w.entities, CAPTION_COUNT if i % 2 else INTERLEAVED_COUNT, 0.5)
        parts = w.entities.parts[scene.entities]
        pixels = w._renderer.render(scene, parts, chooser.hidden(w._renderer.n_hidden))
        cells, colours, read, bars, digit = read_image(w, pixels)
        assert (cells, colours, bars) == (scene.cells, scene.colours, scene.bars)
        assert read == parts.tolist()
        assert digit == (scene.sign[0] if scene.sign else None)
        read_colours.update(colours)
        read_tones.update(enumerate(bars))
        read_digits.add(digit)
    assert len(read_colours) == len(TILE_RGB) == len(COLOUR_WORDS)
    assert len(read_tones) == 2 * MOD == 2 * len(BAR_RGB)
    assert len(read_digits) == 11  # none, or one of ten


@pytest.fixture(scope="module")
def identify(world):
    """(cells, colours, entities, bars, digit) from pixels and the table of glyphs."""
    code = world.entities.parts.astype(np.int64) @ (64**3, 64**2, 64, 1)
    order = np.argsort(code)

    def read(pixels):
        cells, colours, parts, bars, digit = read_image(world, pixels)
        codes = np.array(parts, dtype=np.int64) @ (64**3, 64**2, 64, 1)
        return cells, colours, order[np.searchsorted(code[order], codes)].tolist(), bars, digit

    return read


def seen_from(a: int, b: int) -> str:
    """Where cell b is, seen from cell a."""
    dx, dy = b % 3 - a % 3, b // 3 - a // 3
    return "left" if dx < 0 else "right" if dx > 0 else "above" if dy < 0 else "below"


def test_captions_are_true_of_their_pixels(world, identify):
    """A reader with the glyph-to-name table checks every statement of 250 captions."""
    e = world.entities
    answers, sums, rims, orders = {"before": 0, "after": 0}, 0, 0, set()
    for i in range(250):
        sample = world.sample(4, "caption", 0, i)
        pixels = next(s.pixels for s in sample.segments if isinstance(s, Image))
        cells, colours, ids, bars, digit = identify(pixels)
        said = words_of(sample)
        image = said.index("[image]")
        spoken, asked = [], []

        def question(at, said=said, asked=asked, spoken=spoken):
            """(place after the question's side, sums said): `ask a b a+b` any number of times, then `ask a side`."""
            n = 0
            while said[at] == "ask" and said[at + 2] not in SIDE_WORDS:
                a, b, y = (NUMERAL_WORDS.index(w) for w in said[at + 1 : at + 4])
                assert y == (a + b) % MOD
                at, n = at + 4, n + 1
            assert said[at] == "ask"
            asked.append((NUMERAL_WORDS.index(said[at + 1]), SIDE_WORDS.index(said[at + 2])))
            spoken.append(said[at + 2])
            return at + 3, n

        at = 0
        while at < image:
            at, n = question(at)
            sums += n
        at += 1
        for operand, side in asked:
            assert said[at : at + 2] == [SIDE_WORDS[side], NUMERAL_WORDS[(bars[side] + operand) % MOD]]
            at += 2
            answers["before"] += 1
        assert said[at] == NUMERAL_WORDS[len(cells)]
        at += 1
        left = list(range(len(cells)))
        told = []
        while left:  # in any order
            place = colours.index(COLOUR_WORDS.index(said[at]))
            left.remove(place)
            told.append(place)
            assert said[at + 1 : at + 4] == [WORDS[t] for t in e.name_tokens(ids[place])]
            at += 4
            for which, word in enumerate(("is", "lives", "eats")):
                if said[at] == word:
                    assert said[at + 1] == WORDS[e.trait_tokens(ids[place])[which]]
                    at += 2
                    break
        orders.add(tuple(told))
        if digit is not None:
            assert said[at : at + 2] == ["sign", NUMERAL_WORDS[digit]]
            at += 2
        assert said[at] == "."
        at += 1
        if said[at] == "from":
            a, b = (cells[colours.index(COLOUR_WORDS.index(said[at + n]))] for n in (1, 2))
            assert said[at + 3] == seen_from(a, b)
            at += 4
        while at < len(said) and said[at] == "rim":
            assert said[at + 2] == NUMERAL_WORDS[bars[SIDE_WORDS.index(said[at + 1])]]
            spoken.append(said[at + 1])
            at += 3
            rims += 1
        while at < len(said):
            at, n = question(at)
            sums += n
            operand, side = asked[-1]
            assert said[at] == NUMERAL_WORDS[(bars[side] + operand) % MOD]
            at += 1
            answers["after"] += 1
        assert sorted(spoken) == sorted(SIDE_WORDS)  # each bar is spoken of once
    assert min(answers.values()) > 90
    assert answers["before"] + answers["after"] == rims == 250
    assert sums / 250 == pytest.approx(captions.P_SUM, abs=0.13)  # four standard errors
    assert {(0, 1), (1, 0)} <= orders


def test_interleaved_documents_are_true_of_their_pixels(world, identify):
    """The same for 60 documents of several images: remarks on the last one, nicknames, and what looks back."""
    e, kinds = world.entities, Counter()
    for i in range(60):
        sample = world.sample(4, "interleaved", 0, i)
        pictures = [identify(s.pixels) for s in sample.segments if isinstance(s, Image)]
        said, at, n, called = words_of(sample), 0, -1, {}
        while at < len(said):
            waiting = []
            while said[at] == "ask":
                waiting.append((said[at + 1], said[at + 2]))
                at += 3
            assert said[at] == "[image]"
            at, n = at + 1, n + 1
            cells, colours, ids, bars, digit = pictures[n]
            for operand, side in waiting:
                answer = NUMERAL_WORDS[(bars[SIDE_WORDS.index(side)] + NUMERAL_WORDS.index(operand)) % MOD]
                assert said[at : at + 2] == [side, answer]
                at, kinds["before"] = at + 2, kinds["before"] + 1
            assert said[at] == NUMERAL_WORDS[len(cells)]
            at, left = at + 1, set(range(len(cells)))
            while left:
                place = colours.index(COLOUR_WORDS.index(said[at]))
                left.remove(place)
                assert said[at + 1 : at + 4] == [WORDS[t] for t in e.name_tokens(ids[place])]
                at += 4
            if digit is not None:
                assert said[at : at + 2] == ["sign", NUMERAL_WORDS[digit]]
                at += 2
            for _ in range(interleaved.MAX_EXTRAS):
                if said[at] == ".":
                    break
                back = ORDINAL_WORDS.index(said[at]) if said[at] in ORDINAL_WORDS else None
                assert back is None or back < n
                at += back is not None
                cells, colours, ids, bars, _ = pictures[n if back is None else back]
                word, rest = said[at], said[at + 1 : at + 4]
                if word in called:  # a nickname, perhaps of an earlier image's entity
                    which = ("is", "lives", "eats").index(rest[0])
                    assert rest[1] == WORDS[e.trait_tokens(called[word])[which]]
                    word, at = "nickname", at + 3
                elif word in COLOUR_WORDS:
                    assert back is not None
                    place = colours.index(COLOUR_WORDS.index(word))
                    assert rest == [WORDS[t] for t in e.name_tokens(ids[place])]
                    word, at = "colour", at + 4
                elif word == "call":
                    assert rest[1] in NICKNAME_WORDS
                    called[rest[1]] = ids[colours.index(COLOUR_WORDS.index(rest[0]))]
                    at += 3
                elif word == "from":
                    assert rest[2] == seen_from(*(cells[colours.index(COLOUR_WORDS.index(c))] for c in rest[:2]))
                    at += 4
                elif word == "rim":
                    assert rest[1] == NUMERAL_WORDS[bars[SIDE_WORDS.index(rest[0])]]
                    at += 3
                else:
                    assert word == "ask"
                    total = bars[SIDE_WORDS.index(rest[1])] + NUMERAL_WORDS.index(rest[0])
                    assert rest[2] == NUMERAL_WORDS[total % MOD]
                    at += 4
                kinds[word if back is None else f"{word} back"] += 1
            assert said[at] == "."
            at += 1
        assert n + 1 == len(pictures)
    assert set(kinds) == {"before", "ask", "ask back", "colour back", "rim", "from", "call", "nickname"}
    assert min(kinds.values()) >= 5


def test_text_documents_tell_the_same_facts_and_add_up(world):
    """Names of text are those of the images' entities, with their traits; sums and successors are right."""
    e, kinds, zipf = world.entities, Counter(), []
    code = e.names.astype(np.int64) @ (128**2, 128, 1)
    order = np.argsort(code)
    for i in range(60):
        sentences = " ".join(words_of(world.sample(4, "text", 0, i))).split(" .")
        assert sentences.pop() == ""
        for sentence in sentences:
            said = sentence.split()
            if said[0] == "sum":
                a, b, y = (NUMERAL_WORDS.index(w) for w in said[1:])
                assert y == (a + b) % MOD
                kinds["sum"] += 1
            elif said[0] == "after":
                a, y = (NUMERAL_WORDS.index(w) for w in said[1:])
                assert y == (a + 1) % 10
                kinds["after"] += 1
            elif said[0] in SYLLABLE_WORDS:
                name = np.array([SYLLABLE_WORDS.index(w) for w in said[:3]]) @ (128**2, 128, 1)
                k = int(order[np.searchsorted(code[order], name)])
                assert code[k] == name
                zipf.append(k)
                facts = [said[3:5], said[6:]] if len(said) > 5 else [said[3:]]
                assert said[5:6] == ["and"] * (len(facts) - 1)
                for verb, value in facts:
                    assert value == WORDS[e.trait_tokens(k)[("is", "lives", "eats").index(verb)]]
                assert len({verb for verb, _ in facts}) == len(facts)
                kinds[f"{len(facts)} facts"] += 1
            else:
                assert 5 <= len(said) <= 24
                a = b = LEXICON_SIZE
                for word in map(WORDS.index, said):  # one of those that may follow the two before it, in their order
                    assert word in world._rules.candidates(a, b)
                    a, b = b, word - LEXICON
                kinds["rule"] += 1
    assert set(kinds) == {"sum", "after", "1 facts", "2 facts", "rule"}
    assert min(kinds.values()) > 5
    assert np.mean(np.array(zipf) == 0) == pytest.approx(e.p[0], abs=0.12)


def test_hidden_bytes_never_touch_the_text(world):
    class Noisy(Chooser):
        def hidden(self, n):
            return super().hidden(n) ^ np.uint8(0x5A)

    for domain in ("caption", "interleaved"):
        docs = []
        for kind in (Chooser, Noisy):
            doc = world.document(kind(np.random.Philox(key=5)))
            world.write(domain, doc)
            docs.append(doc.finish(""))
        assert words_of(docs[0]) == words_of(docs[1])
        pixels = [next(s.pixels for s in d.segments if isinstance(s, Image)) for d in docs]
        assert (pixels[0] != pixels[1]).any()


# --- what the classes mean ------------------------------------------------------------------------------------------


def bars_spoken_of(sample):
    """[(image, kind, side, operand or None, answer)] of every bar the text reads or answers about, in order.

    Reads `ask a side` before an image, `side y` right after it, `ask a side y`, `ORDINAL ask a side y`, `rim side y`.
    An answer of class tone is a reading: its question adds zero, and its kind here is "read".
    """
    found, waiting, image = [], [], -1
    for s in sample.segments:
        if isinstance(s, Image):
            image += 1
            continue
        words = [WORDS[i] for i in s.ids.tolist()]
        for j, kind in enumerate(s.token_class.tolist()):
            if kind not in (TONE, FUSION_AFTER, FUSION_BEFORE):
                continue
            if words[j - 2] == "rim":
                assert kind == TONE
                found.append((image, "rim", words[j - 1], None, words[j]))
            elif waiting:
                operand, side = waiting.pop(0)
                assert side == words[j - 1]
                assert kind != FUSION_AFTER
                found.append((image, "before" if kind == FUSION_BEFORE else "read", side, operand, words[j]))
            else:
                assert words[j - 3] == "ask"
                assert kind != FUSION_BEFORE
                back = words[j - 4] if j >= 4 else ""
                of = ORDINAL_WORDS.index(back) if back in ORDINAL_WORDS else image
                assert of < image or back not in ORDINAL_WORDS
                what = "read" if kind == TONE else "back" if of < image else "after"
                found.append((of, what, words[j - 1], words[j - 2], words[j]))
        assert not waiting  # every question is answered in the segment after the image
        unanswered = [j for j, w in enumerate(words) if w in SIDE_WORDS and words[j - 2] == "ask"]
        waiting = [(words[j - 1], words[j]) for j in unanswered if j + 1 == len(words) or words[j + 1] == "ask"]
    assert not waiting
    return found


@pytest.fixture(scope="module")
def remarks(world):
    """Per domain, what each of many documents says about bars."""
    some = {"caption": 4000, "interleaved": 4000}
    return {d: [bars_spoken_of(world.sample(9, d, 1, i)) for i in range(n)] for d, n in some.items()}


def test_no_bar_is_spoken_of_twice(remarks):
    """A tone read out, or an answer given, would give a later answer about the same bar away."""
    kinds = {d: {} for d in remarks}
    for domain, documents in remarks.items():
        for document in documents:
            bars = [(image, side) for image, _, side, _, _ in document]
            assert len(set(bars)) == len(bars)
            for _, kind, *_ in document:
                kinds[domain][kind] = kinds[domain].get(kind, 0) + 1
    assert set(kinds["caption"]) == {"before", "after", "rim", "read"}
    assert set(kinds["interleaved"]) == {"before", "after", "rim", "back", "read"}
    assert min(min(counts.values()) for counts in kinds.values()) > 50
    two = [d for d in remarks["interleaved"] for i in range(4) if sum(m[:2] == (i, "before") for m in d) == 2]
    assert len(two) > 50  # two questions before one image: never of the same side


def test_among_fusion_tokens_operands_are_uniform_and_readings_add_zero(remarks):
    """Zero is asked twice as often as any other operand; the half counted as readings makes fusion even again."""
    counts = {"fusion": np.zeros(MOD), "read": np.zeros(MOD)}
    for documents in remarks.values():
        for _, what, _, operand, _ in (m for document in documents for m in document):
            if what != "rim":
                counts["read" if what == "read" else "fusion"][NUMERAL_WORDS.index(operand)] += 1
    n, read = counts["fusion"].sum(), counts["read"]
    assert n > 4000
    assert abs(counts["fusion"] - n / MOD).max() < 4 * math.sqrt(n / MOD)
    assert read[1:].sum() == 0
    assert abs(read[0] - n / MOD) < 6 * math.sqrt(n / MOD)


@pytest.mark.parametrize("kind", ["before", "after", "back"])
def test_text_alone_says_nothing_about_a_fusion_answer(remarks, kind):
    """Given operand and side the answer is uniform; given the tone or answer told before it too: entropy log m."""
    table, earlier = np.zeros((2, MOD, MOD)), np.zeros((MOD, MOD, MOD))
    for documents in remarks.values():
        for document in documents:
            last = None
            for _, what, side, operand, answer in document:
                y = NUMERAL_WORDS.index(answer)
                if what == kind:
                    a = NUMERAL_WORDS.index(operand)
                    table[SIDE_WORDS.index(side), a, y] += 1
                    if last is not None:
                        earlier[a, last, y] += 1
                last = y
    assert table.sum() > (150 if kind == "back" else 1000)
    assert earlier.sum() > 150
    for counts in (table.reshape(-1, MOD), earlier.reshape(-1, MOD)):
        expected = counts.sum(1, keepdims=True) / MOD
        chi2, cells = ((counts - expected) ** 2 / expected).sum(), (MOD - 1) * len(counts)
        assert chi2 < cells + 5 * math.sqrt(2 * cells)
    assert World.chance[f"fusion-{'after' if kind == 'back' else kind}"] == World.chance["tone"] == math.log(MOD)


def test_questions_before_and_after_are_about_equally_common(world):
    counts = np.zeros(len(World.CLASSES))
    for i in range(400):
        for s in world.sample(0, "caption", 0, i).segments:
            if not isinstance(s, Image):
                counts += np.bincount(s.token_class, minlength=len(counts))
    before, after = (counts[World.CLASSES.index(c)] for c in ("fusion-before", "fusion-after"))
    assert 0.75 < before / after < 1.33
    assert before + after + counts[TONE] == 2 * 400  # each bar is spoken of once, in a question or a reading
    assert abs((before + after) / 400 - MOD / (MOD + 1)) < 0.1


def test_image_determined_classes_are_certain_and_lookups_are_first_mentions(world):
    certain = [
        World.CLASSES.index(c)
        for c in ("lookup", "spatial", "count", "attribute", "fusion-after", "fusion-before", "reference", "tone")
    ]
    lookup = World.CLASSES.index("lookup")
    for d in ("caption", "interleaved"):
        for i in range(60):
            sample = world.sample(0, d, 0, i)
            texts = [s for s in sample.segments if not isinstance(s, Image)]
            ids = np.concatenate([s.ids for s in texts])
            classes = np.concatenate([s.token_class for s in texts])
            oracle = np.concatenate([s.oracle for s in texts])
            assert (oracle[np.isin(classes, certain)] == 0).all()
            named = [t for k in sample.meta["lookups"] for t in world.entities.name_tokens(k)]
            assert ids[classes == lookup].tolist() == named
            assert len(set(sample.meta["lookups"])) == len(sample.meta["lookups"]) <= sample.meta["exposures"]


def test_learner_bound_falls_slowly_and_matches_a_simulated_learner(world):
    draws = [10.0**k for k in range(3, 8)]
    values = [world.learner_bound(n) for n in draws]
    slopes = np.diff(np.log10(values))
    assert all(a > b > 0 for a, b in pairwise(values))
    assert ((slopes < -0.2) & (slopes > -0.45)).all()
    assert (np.diff(slopes) < 0).all()  # it bends, slowly
    assert math.isclose(world.learner_bound(0), math.log(128**3), rel_tol=1e-9)

    rng = np.random.default_rng(0)
    e, n = world.entities, 20_000
    cum = np.cumsum(e.p)
    seen = np.searchsorted(cum, rng.random(n))
    asked = np.minimum(np.searchsorted(cum, rng.random(n)), len(cum) - 1)
    simulated = (~np.isin(asked, seen)).mean() * bound.name_nats_unseen(e, n)
    assert math.isclose(simulated, world.learner_bound(n), rel_tol=0.06)
    assert math.isclose(world.learner_bound(n, asked), world.learner_bound(n), rel_tol=0.06)
    assert world.learner_bound(n, []) == 0.0
    with pytest.raises(InputError, match="negative"):
        world.learner_bound(-1)


def test_longest_caption_is_what_the_size_check_assumes(world):
    texts = [
        sum(len(s.ids) for s in world.sample(0, "caption", 2, i).segments if not isinstance(s, Image))
        for i in range(1500)
    ]
    assert captions.LONGEST - 16 < max(texts) <= captions.LONGEST
    assert interleaved.BODY < captions.LONGEST
