"""The world as a source: injective names and glyphs, determinism, visible pixels, length cap, learner's bound."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from isofusion.config import WorldConfig
from isofusion.data.sample import DOMAINS, Image
from isofusion.data.world import World, bound, captions, interleaved
from isofusion.data.world.choice import Chooser
from isofusion.data.world.scene import (
    BACKGROUND,
    CAPTION_COUNT,
    FRAME_RGB,
    GLYPH_RGB,
    INTERLEAVED_COUNT,
    NOISE,
    SAILS,
    SIGN_RGB,
    draw_scene,
)
from isofusion.data.world.vocab import COLOUR_WORDS, FRAME_WORDS, MOD, NUMERAL_WORDS, SIDE_WORDS, WORDS, WorldTokenizer
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
    """(cells, colours, parts, frame, digit) from pixels alone."""
    r = world._renderer
    frame = [
        int(np.bincount(nearest(bar, FRAME_RGB).ravel()).argmax())
        for bar in (pixels[0, 6:-6], pixels[-1, 6:-6], pixels[6:-6, 0], pixels[6:-6, -1])
    ]
    palette = np.concatenate([np.full((1, 3), BACKGROUND), GLYPH_RGB, SIGN_RGB[None]])
    digits = {tuple(d[:: r.cell, :: r.cell, 0].ravel().tolist()): i for i, d in enumerate(r.digits)}
    cells, colours, parts, digit = [], [], [], None
    for cell in range(9):
        y, x = r.corner(cell)
        seen = nearest(pixels[y : y + 6 * r.cell - 1, x : x + 6 * r.cell - 1], palette)
        if not seen.any():
            continue
        found = int(seen.max())
        assert set(np.unique(seen)) == {0, found}
        on = seen > 0
        matches = []
        for dy in range(r.cell):
            for dx in range(r.cell):
                grid = on[dy : dy + 5 * r.cell, dx : dx + 5 * r.cell]
                small = grid[:: r.cell, :: r.cell]
                if not (small.repeat(r.cell, 0).repeat(r.cell, 1) == grid).all() or on.sum() != grid.sum():
                    continue
                if found == len(palette) - 1:
                    matches.append(digits.get(tuple(small[:, 1:4].ravel().tolist())))
                else:
                    sails = (small[a : a + h, b : b + w].ravel() for a, b, h, w in SAILS)
                    matches.append([int(bits @ (1 << np.arange(6))) for bits in sails])
        assert len(matches) == 1, "exactly one jitter explains the pixels"
        if found == len(palette) - 1:
            digit = matches[0]
        else:
            cells.append(cell)
            colours.append(found - 1)
            parts.append(matches[0])
    return cells, colours, parts, frame, digit


@pytest.mark.parametrize("size", [48, 100])
def test_pixels_give_the_whole_scene_away(size):
    w = World(WorldConfig(), size, size // 6 if size == 48 else 10, 256)
    chooser = Chooser(np.random.Philox(key=11))
    for i in range(200 if size == 48 else 40):
        scene = draw_scene(chooser, w.entities, CAPTION_COUNT if i % 2 else INTERLEAVED_COUNT, 0.5)
        parts = w.entities.parts[scene.entities]
        pixels = w._renderer.render(scene, parts, chooser.hidden(w._renderer.n_hidden))
        cells, colours, read, frame, digit = read_image(w, pixels)
        assert (cells, colours, frame) == (scene.cells, scene.colours, scene.frame)
        assert read == parts.tolist()
        assert digit == (scene.sign[0] if scene.sign else None)


def test_captions_are_true_of_their_pixels(world):
    """A reader with the glyph-to-name table checks every statement of 150 captions."""
    e = world.entities
    code = e.parts.astype(np.int64) @ (64**3, 64**2, 64, 1)
    order = np.argsort(code)
    answers = {"before": 0, "after": 0}
    for i in range(150):
        sample = world.sample(4, "caption", 0, i)
        pixels = next(s.pixels for s in sample.segments if isinstance(s, Image))
        cells, colours, parts, frame, digit = read_image(world, pixels)
        codes = np.array(parts, dtype=np.int64) @ (64**3, 64**2, 64, 1)
        ids = order[np.searchsorted(code[order], codes)]
        said = words_of(sample)
        image = said.index("[image]")
        asked = {said[j + 2]: NUMERAL_WORDS.index(said[j + 1]) for j in range(image) if said[j] == "ask"}
        at = image + 1
        for side, operand in asked.items():
            y = NUMERAL_WORDS[(frame[SIDE_WORDS.index(side)] + operand) % MOD]
            assert said[at : at + 2] == [side, y]
            at += 2
            answers["before"] += 1
        assert said[at] == NUMERAL_WORDS[len(cells)]
        at += 1
        for k, colour in zip(ids.tolist(), colours, strict=True):
            assert said[at : at + 4] == [COLOUR_WORDS[colour], *(WORDS[t] for t in e.name_tokens(k))]
            at += 4
            for which, word in enumerate(("is", "lives", "eats")):
                if said[at] == word:
                    assert said[at + 1] == WORDS[e.trait_tokens(k)[which]]
                    at += 2
                    break
        if digit is not None:
            assert said[at : at + 2] == ["sign", NUMERAL_WORDS[digit]]
            at += 2
        assert said[at] == "."
        at += 1
        if at < len(said) and said[at] == "from":
            a, b = (cells[colours.index(COLOUR_WORDS.index(said[at + n]))] for n in (1, 2))
            dx, dy = b % 3 - a % 3, b // 3 - a // 3
            assert said[at + 3] == ("left" if dx < 0 else "right" if dx > 0 else "above" if dy < 0 else "below")
            at += 4
        while at < len(said) and said[at] == "rim":
            assert FRAME_WORDS[frame[SIDE_WORDS.index(said[at + 1])]] == said[at + 2]
            assert said[at + 1] not in asked
            at += 3
        while at < len(said):
            assert said[at] == "ask"
            operand, side = NUMERAL_WORDS.index(said[at + 1]), SIDE_WORDS.index(said[at + 2])
            assert said[at + 3] == NUMERAL_WORDS[(frame[side] + operand) % MOD]
            at += 4
            answers["after"] += 1
    assert min(answers.values()) > 100


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


@pytest.mark.parametrize("kind", ["fusion-before", "fusion-after"])
def test_text_alone_says_nothing_about_a_fusion_answer(world, kind):
    """Given operand and side the answer is uniform; given the other answers too."""
    code = World.CLASSES.index(kind)
    table = np.zeros((4 * MOD, MOD))
    earlier = np.zeros((MOD, MOD))
    for i in range(1200):
        sample = world.sample(9, "caption", 1, i)
        said = words_of(sample)
        asks = {said[j + 2]: NUMERAL_WORDS.index(said[j + 1]) for j, w in enumerate(said) if w == "ask"}
        last = None
        for s in sample.segments:
            if isinstance(s, Image):
                continue
            for j in np.flatnonzero(s.token_class == code).tolist():
                side, y = WORDS[s.ids[j - 1]], NUMERAL_WORDS.index(WORDS[s.ids[j]])
                table[asks[side] * 4 + SIDE_WORDS.index(side), y] += 1
                if last is not None:
                    earlier[last, y] += 1
                last = y
    assert table.sum() > 1000
    for counts in (table, earlier):
        expected = counts.sum(1, keepdims=True) / MOD
        chi2, cells = ((counts - expected) ** 2 / expected).sum(), (MOD - 1) * len(counts)
        assert chi2 < cells + 5 * math.sqrt(2 * cells)


def test_questions_before_and_after_are_about_equally_common(world):
    counts = np.zeros(len(World.CLASSES))
    for i in range(400):
        for s in world.sample(0, "caption", 0, i).segments:
            if not isinstance(s, Image):
                counts += np.bincount(s.token_class, minlength=len(counts))
    before, after = (counts[World.CLASSES.index(c)] for c in ("fusion-before", "fusion-after"))
    assert 0.75 < before / after < 1.33
    assert before + after > 2 * 400


def test_image_determined_classes_are_certain_and_lookups_are_first_mentions(world):
    certain = [World.CLASSES.index(c) for c in ("lookup", "spatial", "count", "attribute", "fusion-after", "reference")]
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
