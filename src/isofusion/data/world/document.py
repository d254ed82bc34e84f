"""The phrases that captions and interleaved documents share: describe, ask, answer, relate, read a bar."""

from __future__ import annotations

import math
from typing import NamedTuple

from isofusion.data.world.choice import EVEN, Chooser, Table, Writer, table
from isofusion.data.world.entities import Entities
from isofusion.data.world.scene import Renderer, Scene, draw_scene, relation_nats
from isofusion.data.world.vocab import (
    ASK,
    ATTRIBUTE,
    CHOICE,
    COLOUR,
    COLOURS,
    COUNT,
    FROM,
    FUSION_AFTER,
    FUSION_BEFORE,
    GRAMMAR,
    LOOKUP,
    MOD,
    NAME,
    NUMERAL,
    NUMERALS,
    REFERENCE,
    RIM,
    SIDES,
    SIGN,
    SPATIAL,
    TONE,
    TRAITS,
)

TRAIT_AFTER_NAME = table((0.55, 0.15, 0.15, 0.15))  # nothing, is, lives, eats
OPERAND = table((2.0,) + (1.0,) * (MOD - 1))
"""Operand of a question, zero twice as often as any other: adding zero is reading, the first step to a sum."""


class Question(NamedTuple):
    """Its answer is (tone of the bar on `side` + operand) mod m.

    `reading`: half of the questions that add zero are counted as `tone`, not as fusion. The text does not tell which.
    So among fusion tokens operands are uniform, and neither modality alone says anything about the answer.
    """

    operand: int
    side: int
    reading: bool


class Document(Writer):
    """A writer that knows the entities and can draw."""

    def __init__(self, chooser: Chooser, max_len: int, patches: int, entities: Entities, renderer: Renderer) -> None:
        super().__init__(chooser, max_len, patches)
        self.entities = entities
        self.renderer = renderer
        self.named: set[int] = set()

    def look(self, count: Table, p_sign: float) -> Scene:
        """Draws a scene and appends its image."""
        scene = draw_scene(self.chooser, self.entities, count, p_sign)
        parts = self.entities.parts[scene.entities]
        self.image(self.renderer.render(scene, parts, self.chooser.hidden(self.renderer.n_hidden)))
        return scene

    def read_name(self, k: int) -> None:
        """The name of an entity that a glyph shows: nothing to pay, but everything to know."""
        kind = REFERENCE if k in self.named else LOOKUP
        if kind == LOOKUP:
            self.named.add(k)
            self.lookups.append(k)
        for token, blind in zip(self.entities.name_tokens(k), self.entities.name_nats[k].tolist(), strict=True):
            self.put(token, kind, blind=blind)

    def draw_name(self) -> int:
        """The name of an entity drawn by frequency: each syllable pays -log p given those before."""
        k = self.chooser.choose(self.entities.draw, "entity")
        self.exposures += 1
        for token, nats in zip(self.entities.name_tokens(k), self.entities.name_nats[k].tolist(), strict=True):
            self.put(token, NAME, nats)
        return k

    def trait(self, k: int, which: int) -> None:
        self.put(TRAITS[which], GRAMMAR)
        self.put(self.entities.trait_tokens(k)[which], ATTRIBUTE)

    def describe(self, scene: Scene, traits: bool) -> None:
        """Count; each entity's colour and name, with a trait now and then; the numeral if one is drawn."""
        self.put(NUMERALS[len(scene.entities)], COUNT, blind=scene.count.nats[len(scene.entities) - 1])
        self.exposures += len(scene.entities)
        places = list(range(len(scene.entities)))
        while places:  # in any order: the colour drawn says which entity comes next
            left = len(places)
            unused = len(COLOURS) - len(scene.entities) + left  # colours that the text has not yet named
            tokens = [COLOURS[scene.colours[i]] for i in places]
            place = places.pop(self.pick(tokens, COLOUR, blind=math.log(unused / left)))
            k = scene.entities[place]
            self.read_name(k)
            which = self.defer(TRAIT_AFTER_NAME) if traits else 0
            if which:
                self.trait(k, which - 1)
        self.pending_blind += scene.signed.nats[scene.sign is not None]
        if scene.sign is not None:
            self.put(SIGN, GRAMMAR)
            self.put(NUMERALS[scene.sign[0]], NUMERAL, blind=math.log(10))

    def question(self, free_sides: list[int], p_sum: float = 0.0) -> Question:
        """`ask one top`: side uniform among those not spoken of yet.

        With chance `p_sum` an addition in words goes before, `ask one one zero`: the same sum with nothing to see.
        """
        self.put(ASK, GRAMMAR)
        operand = self.chooser.choose(OPERAND, "operand")
        self.put(NUMERALS[operand], CHOICE, OPERAND.nats[operand])
        if p_sum and self.defer(table((1 - p_sum, p_sum))):
            other = self.pick(NUMERALS[:MOD], CHOICE)
            self.put(NUMERALS[(operand + other) % MOD], NUMERAL)
            return self.question(free_sides)
        side = free_sides.pop(self.pick([SIDES[s] for s in free_sides], CHOICE))
        return Question(operand, side, not operand and bool(self.chooser.choose(EVEN, "reading")))

    def ask_after(self, scene: Scene, p_sum: float = 0.0) -> None:
        """`ask one top zero`: the answer stands right after the side, where side and operand are nearest."""
        self.reply(scene, self.question(scene.free_sides, p_sum), FUSION_AFTER)

    def answer(self, scene: Scene, questions: list[Question]) -> None:
        """`top zero`, in the order of the questions before the image."""
        for question in questions:
            self.put(SIDES[question.side], REFERENCE)
            self.reply(scene, question, FUSION_BEFORE)

    def reply(self, scene: Scene, question: Question, kind: int) -> None:
        """The number asked for, of class `kind`, or TONE if the question counts as a reading."""
        answer = (scene.bars[question.side] + question.operand) % MOD
        self.put(NUMERALS[answer], TONE if question.reading else kind, blind=math.log(MOD))

    def relate(self, scene: Scene) -> None:
        """`from red blue left`: seen from the red one, the blue one is left."""
        self.put(FROM, GRAMMAR)
        places = list(range(len(scene.entities)))
        a = places.pop(self.pick([COLOURS[scene.colours[i]] for i in places], CHOICE))
        b = places[self.pick([COLOURS[scene.colours[i]] for i in places], CHOICE)]
        self.put(scene.relation(a, b), SPATIAL, blind=relation_nats(scene, a, b))
        scene.related.append((a, b))

    def read_rim(self, scene: Scene) -> None:
        """`rim top one`: the tone of a bar read out, on a side that no question asks about."""
        self.put(RIM, GRAMMAR)
        side = scene.free_sides.pop(self.pick([SIDES[s] for s in scene.free_sides], CHOICE))
        self.put(NUMERALS[scene.bars[side]], TONE, blind=math.log(MOD))

    def structure(self, dist: Table, label: str = "structure") -> int:
        """A choice that costs nothing: only whether an image comes next depends on it."""
        return self.chooser.choose(dist, label)
