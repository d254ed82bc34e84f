"""Stated log-probabilities against brute force: all choices enumerated on tiny worlds, grouped by *visible* history."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest

from isofusion.config import WorldConfig
from isofusion.data.sample import Image
from isofusion.data.world import World, interleaved, scene, text
from isofusion.data.world.document import Document
from isofusion.data.world.scene import Renderer
from isofusion.data.world.vocab import (
    ATTRIBUTE,
    CHOICE,
    COLOUR,
    COUNT,
    FUSION_AFTER,
    FUSION_BEFORE,
    GRAMMAR,
    LOOKUP,
    MOD,
    NUMERAL,
    REFERENCE,
    SPATIAL,
    TONE,
)

SCENE_LABELS = ("count", "cell", "bar", "sign", "digit", "entity", "colour")
TONES = tuple(range(MOD))
STILL = dict.fromkeys(SCENE_LABELS, (0,))  # one and the same image
EXTRAS = interleaved.EXTRAS
SPEAKS_OF_BARS = (interleaved.STOP_, interleaved.ASK_, interleaved.RIM_, interleaved.BACK_)


class Stop(Exception):
    pass


class Enumerator:
    """Stands in for Chooser: follows a script of outcomes, takes the first possible one beyond its end."""

    def __init__(self, script, pinned):
        self.script, self.pinned = script, pinned
        self.at, self.p, self.wide = 0, 1.0, []

    def choose(self, dist, label):
        options = [i for i in range(len(dist.probs)) if dist.probs[i] > 0]
        if label in self.pinned:  # fewer scenes or structures: allowed, because these choices cost no nats
            options = [i for i in options if i in self.pinned[label]] or options[:1]
        total = math.fsum(dist.probs[i] for i in options)
        if self.at == len(self.script):
            self.script.append(0)
        pick = self.script[self.at]
        self.wide.append(len(options))
        self.at += 1
        self.p *= dist.probs[options[pick]] / total
        return options[pick]

    def hidden(self, n):
        return np.zeros(n, np.uint8)


class Remembering(Renderer):
    """Draws each scene once: hidden bytes are zero here, so a scene is always the same image."""

    def __init__(self, size):
        super().__init__(size)
        self.drawn = {}

    def render(self, scene, parts, hidden):
        key = repr((scene.colours, scene.cells, scene.bars, scene.sign, parts.tolist()))
        if key not in self.drawn:
            self.drawn[key] = super().render(scene, parts, hidden)
        return self.drawn[key]


class Limited(Document):
    limit = 0

    def put(self, token, kind, nats=0.0, blind=0.0):
        super().put(token, kind, nats, blind)
        self.limit -= 1
        if self.limit == 0:
            raise Stop


def enumerate_all(world, domain, pinned, limit):
    """Yields (probability, [(event, nats or None, class or None, nats given the text alone or None)]) of each path.

    An event is a token, "eos" or an image's bytes.
    """
    script, renderer = [], Remembering(world.image_size)
    while True:
        chooser = Enumerator(script, pinned)
        doc = Limited(chooser, world.max_len, world.patches_per_image, world.entities, renderer)
        doc.limit = limit
        whole = True
        try:
            world.write(domain, doc)
        except Stop:
            whole = False
        sample = doc.finish("")
        events, blind = [], sample.meta["text_nats"].tolist()
        for s in sample.segments:
            if isinstance(s, Image):
                events.append((s.pixels.tobytes(), None, None, None))
            else:
                some, blind = blind[: len(s.ids)], blind[len(s.ids) :]
                events += list(zip(s.ids.tolist(), s.oracle.tolist(), s.token_class.tolist(), some, strict=True))
        if whole:
            events.append(("eos", sample.meta["eos_oracle"], sample.meta["eos_class"], *blind))
        yield chooser.p, events
        del script[chooser.at :]
        while script and script[-1] + 1 == chooser.wide[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


def check(world, domain, pinned, limit):
    """-log p(event | visible history, text comes next), by summing paths, is what the writer says."""
    mass, among_text, stated = defaultdict(float), defaultdict(float), {}
    total, paths = 0.0, 0
    for p, events in enumerate_all(world, domain, pinned, limit):
        total, paths = total + p, paths + 1
        history = ()
        for event, nats, *_ in events:
            step = (history, event)
            mass[step] += p
            if nats is not None:
                among_text[history] += p
                assert math.isclose(stated.setdefault(step, nats), nats, abs_tol=1e-6)
            history = hash(step)
    assert math.isclose(total, 1.0, abs_tol=1e-9)
    for step, nats in stated.items():
        assert math.isclose(nats, -math.log(mass[step] / among_text[step[0]]), abs_tol=2e-5), step[1]
    assert any(nats > 0 for nats in stated.values())
    return paths, len(stated)


def text_alone(world, domain, pinned, limit, classes):
    """{class: [(P(event | text before, images blanked), what the writer says)]} over every event of these classes."""
    mass, among, kinds = defaultdict(float), defaultdict(float), defaultdict(set)
    for p, events in enumerate_all(world, domain, pinned, limit):
        history = ()
        for event, nats, kind, blind in events:
            step = (history, event if nats is not None else "[image]")
            mass[step] += p
            if nats is not None:
                among[history] += p
                if kind in classes:
                    kinds[step].add((kind, math.exp(-blind)))
            history = hash(step)
    found = defaultdict(list)
    for step, said in kinds.items():
        for kind, chance in said:
            found[kind].append((mass[step] / among[step[0]], chance))
    return found


@pytest.fixture(scope="module")
def tiny():
    return World(WorldConfig(seed=3, entity_bits=2))


def test_captions_over_many_scenes(tiny):
    pinned = {"count": (0, 1), "cell": (0, 5), "bar": (1,), "digit": (3,), "colour": (0, 1), "structure": (0,)}
    paths, _ = check(tiny, "caption", pinned, 7)
    assert paths > 1000


def test_captions_describe_three_entities_in_any_order(tiny):
    """3 x 2 x 1 orders, one of the entities there twice: what a place in the order costs is log of those left."""
    pinned = STILL | {"count": (2,), "structure": (0,), "entity": (0, 1)}
    paths, events = check(tiny, "caption", pinned, 17)
    assert paths > 2000
    assert events > 1000


def test_captions_to_the_end_with_questions_after(tiny):
    paths, events = check(tiny, "caption", STILL | {"structure": (0,), "entity": (0, 1, 2), "bar": (0, 1)}, 0)
    assert paths > 1000
    assert events > 1000


def test_captions_to_the_end_with_questions_before(tiny):
    assert check(tiny, "caption", STILL | {"count": (1,), "structure": (1,), "bar": (1,)}, 22)[0] > 1000


def test_captions_over_all_tones_with_questions_before_and_after(tiny):
    assert check(tiny, "caption", STILL | {"bar": TONES, "structure": (0, 1), "entity": (0, 1, 2)}, 0)[0] > 2000


def test_without_the_image_tones_and_fusion_answers_are_uniform(tiny, monkeypatch):
    """Exactly 1/m each whatever the text said before: fusion costs log m to a reader of text alone, never less."""
    answers = (FUSION_AFTER, FUSION_BEFORE, TONE)
    found = text_alone(tiny, "caption", STILL | {"bar": TONES, "structure": (0, 1), "entity": (0, 1, 2)}, 0, answers)
    monkeypatch.setattr(interleaved, "MAX_EXTRAS", 1)
    monkeypatch.setattr(interleaved, "P_END", (0.0, 0.0, 1.0))
    monkeypatch.setattr(
        interleaved, "EXTRAS", tuple((w if i in SPEAKS_OF_BARS else 0.0, n) for i, (w, n) in enumerate(EXTRAS))
    )
    # two images, a remark each: questions after the image in text order, and looking back
    monkeypatch.setattr(interleaved, "P_ASK_FIRST", 0.0)
    after = text_alone(tiny, "interleaved", STILL | {"bar": TONES, "entity": (0, 1)}, 0, answers)
    # one or two questions before the first image, then a remark on it
    monkeypatch.setattr(interleaved, "P_ASK_FIRST", 1.0)
    before = text_alone(tiny, "interleaved", STILL | {"bar": TONES, "structure": (0, 1), "entity": (0, 1)}, 17, answers)
    assert set(found) == {FUSION_AFTER, FUSION_BEFORE, TONE}
    assert set(after) == {FUSION_AFTER, TONE}
    assert set(before) == {FUSION_AFTER, FUSION_BEFORE, TONE}
    for by_class in (found, after, before):
        for chances in by_class.values():
            assert len(chances) >= 40  # m = 2: two operands, two sides, two answers, with and without a sum before
            np.testing.assert_allclose(chances, 1 / MOD, rtol=1e-6)


def nothing_but(extra):
    return tuple((w if i in (interleaved.STOP_, extra) else 0.0, n) for i, (w, n) in enumerate(EXTRAS))


@pytest.mark.parametrize(
    ("domain", "free", "classes", "limit"),
    [
        ("caption", {"count": tuple(range(6))}, (COUNT,), 3),
        ("caption", {"colour": tuple(range(6)), "count": (2,)}, (COLOUR,), 12),
        ("caption", {"entity": (0, 1, 2, 3), "count": (1,)}, (LOOKUP, REFERENCE), 11),
        ("caption", {"sign": (0, 1), "digit": tuple(range(10))}, (GRAMMAR, NUMERAL, ATTRIBUTE), 9),
        ("interleaved", {"cell": tuple(range(9)), "count": (1,), "colour": (0, 1)}, (SPATIAL,), 20),
        ("interleaved", {"sign": (0, 1), "digit": (2, 3)}, (GRAMMAR, CHOICE), 9),
    ],
)
def test_nats_of_the_text_alone(tiny, monkeypatch, domain, free, classes, limit):
    """`text_nats` against brute force with images blanked: what may vary in the scene is named, the rest stands still.

    Two relations of one picture depend on each other; the digit's own chance is left out where only two digits occur.
    """
    monkeypatch.setattr(interleaved, "P_END", (0.0, 1.0))
    monkeypatch.setattr(interleaved, "P_ASK_FIRST", 0.0)
    monkeypatch.setattr(interleaved, "MAX_EXTRAS", 2)
    monkeypatch.setattr(interleaved, "EXTRAS", nothing_but(interleaved.FROM_ if "cell" in free else interleaved.STOP_))
    if "cell" in free:  # two colours, so that either entity may be the red one
        monkeypatch.setattr(scene, "TILE_RGB", scene.TILE_RGB[:2])
    found = text_alone(tiny, domain, STILL | {"structure": (0,)} | free, limit, classes)
    assert {SPATIAL, COUNT, COLOUR, LOOKUP, NUMERAL, GRAMMAR} & set(found) == {SPATIAL, COUNT, COLOUR, LOOKUP, NUMERAL,
        GRAMMAR} & set(classes)  # fmt: skip
    for pairs in found.values():
        true, said = np.array(pairs).T
        np.testing.assert_allclose(said, true, rtol=1e-5)
    if classes == (SPATIAL,):
        assert max(a for a, _ in found[SPATIAL]) > 0.999  # the way back follows from the way there


def test_interleaved_extras_nicknames_and_references(tiny, monkeypatch):
    monkeypatch.setattr(interleaved, "MAX_EXTRAS", 1)
    monkeypatch.setattr(interleaved, "P_ASK_FIRST", 0.0)
    monkeypatch.setattr(interleaved, "P_END", (0.0, 0.3, 1.0))
    assert check(tiny, "interleaved", STILL | {"bar": (0, 1)}, 0)[0] > 2000


def test_interleaved_questions_before_and_the_end(tiny, monkeypatch):
    monkeypatch.setattr(interleaved, "MAX_EXTRAS", 0)
    monkeypatch.setattr(interleaved, "P_END", (0.0, 0.3, 1.0))
    assert check(tiny, "interleaved", STILL | {"structure": (0, 1), "bar": (0, 1)}, 0)[0] > 1000


def test_interleaved_two_entities_two_extras(tiny):
    assert check(tiny, "interleaved", STILL | {"count": (1,), "structure": (0,)}, 14)[0] > 300


def test_text_opening(monkeypatch):
    monkeypatch.setattr(text, "MIN_WORDS", 1)
    assert check(World(WorldConfig(seed=3, entity_bits=6)), "text", {}, 3)[0] > 4000


def test_text_facts_sums_and_the_end(tiny, monkeypatch):
    monkeypatch.setattr(text, "KIND", (0.0, 0.8, 0.1, 0.1))
    monkeypatch.setattr(text, "MIN_LEN", 4)
    assert check(tiny, "text", {}, 8)[0] > 500


def test_brute_force_notices_a_wrong_oracle(tiny, monkeypatch):
    """The check itself must be able to fail: price a certain word at 0.1 nats."""
    put = Limited.put
    monkeypatch.setattr(
        Limited, "put", lambda self, token, kind, nats=0.0, blind=0.0: put(self, token, kind, nats + 0.1)
    )
    with pytest.raises(AssertionError):
        check(tiny, "caption", STILL | {"structure": (0,)}, 6)


def test_names_in_text_cost_their_zipf_entropy():
    world = World(WorldConfig(entity_bits=12))
    e = world.entities
    np.testing.assert_allclose(e.name_nats.sum(1), -np.log(e.p), rtol=1e-4)
    first = defaultdict(float)
    for s, nats in zip(e.names[:, 0].tolist(), e.name_nats[:, 0].tolist(), strict=True):
        first[s] = math.exp(-nats)
    assert math.isclose(sum(first.values()), 1.0, rel_tol=1e-5)


def test_rule_entropy_is_about_two_nats():
    assert math.isclose(text.entropy_per_rule_word(), text.RULE_NATS, abs_tol=1e-9)
    world = World(WorldConfig(entity_bits=10))
    rule = World.CLASSES.index("rule")
    nats = []
    for i in range(150):
        for s in world.sample(0, "text", 0, i).segments:
            nats += s.oracle[s.token_class == rule].tolist()
    assert abs(np.mean(nats) - 2.0) < 0.15
