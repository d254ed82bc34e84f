"""Interleaved documents: two to four described images, with questions, nicknames and references to earlier images."""

from __future__ import annotations

from isofusion.data.world.choice import EVEN, table
from isofusion.data.world.document import Document, Question
from isofusion.data.world.scene import INTERLEAVED_COUNT, Scene
from isofusion.data.world.vocab import (
    CALL,
    CHOICE,
    COLOURS,
    GRAMMAR,
    NICKNAMES,
    ORDINALS,
    REFERENCE,
    STOP,
    TRAITS,
)

MAX_IMAGES = 4
P_SIGN = 0.1
P_END = (0.0, 0.0, 0.35, 0.5, 1.0)  # chance to end after that many images
P_ASK_FIRST = 0.45  # chance that a question comes before the next image
MAX_EXTRAS = 3
BODY = 1 + 3 * 4 + 2 + 1  # longest description and its stop
QUESTION, ANSWER = 3, 2
# extras after a description: weight and longest length in tokens
STOP_, ASK_, RIM_, FROM_, CALL_, NICK_, BACK_ = range(7)
EXTRAS = ((0.25, 0), (0.65, 4), (0.5, 3), (0.15, 4), (0.2, 3), (0.25, 3), (0.25, 5))


def write_interleaved(doc: Document) -> None:
    """As many images as chance and room allow; lengths are visible, so room may decide what is possible."""
    scenes: list[Scene] = []
    nicknames: list[tuple[int, int]] = []  # (token, entity)
    while True:
        questions = _next(doc, len(scenes))
        if questions is None:
            return
        scene = doc.look(INTERLEAVED_COUNT, P_SIGN)
        scene.free_sides = [s for s in range(2) if s not in {q.side for q in questions}]
        scenes.append(scene)
        doc.answer(scene, questions)
        doc.describe(scene, traits=False)
        for _ in range(MAX_EXTRAS):
            if not _extra(doc, scenes, nicknames):
                break
        doc.put(STOP, GRAMMAR)


def _next(doc: Document, n: int) -> list[Question] | None:
    """End (None), or the questions that stand before the next image. Only `ask` against EOS is scored."""
    image = doc.patches_per_image + BODY
    if n and doc.room < image:
        return None
    per = QUESTION + ANSWER
    fits = min(2, (doc.room - image) // per)
    p_ask = P_ASK_FIRST if fits else 0.0
    end = P_END[n]
    plan = doc.defer(table((end, (1 - end) * p_ask, (1 - end) * (1 - p_ask)), text=(True, True, False)), "next")
    if plan == 0:
        return None
    if plan == 2:
        return []
    sides = [0, 1]
    questions = [doc.question(sides)]
    if fits > 1 and doc.structure(EVEN):
        questions.append(doc.question(sides))
    return questions


def _extra(doc: Document, scenes: list[Scene], nicknames: list[tuple[int, int]]) -> bool:
    """One more remark (False: none), drawn among those that are possible and fit; its first word tells the kind."""
    scene = scenes[-1]
    earlier = scenes[:-1]
    uncalled = [i for i in range(len(scene.entities)) if i not in scene.called]
    unused = [t for t in NICKNAMES if t not in {token for token, _ in nicknames}]
    possible = (
        True,
        bool(scene.free_sides),
        bool(scene.free_sides),
        len(scene.entities) > 1,
        bool(uncalled and unused),
        bool(nicknames),
        bool(earlier),
    )
    room = doc.room - 1  # the stop
    kind = doc.defer(table(tuple(w if ok and n <= room else 0.0 for (w, n), ok in zip(EXTRAS, possible, strict=True))))
    if kind == ASK_:
        doc.ask_after(scene)
    elif kind == RIM_:
        doc.read_rim(scene)
    elif kind == FROM_:
        doc.relate(scene)
    elif kind == CALL_:
        doc.put(CALL, GRAMMAR)
        place = uncalled[doc.pick([COLOURS[scene.colours[i]] for i in uncalled], CHOICE)]
        scene.called.append(place)
        nicknames.append((unused[doc.pick(unused, CHOICE)], scene.entities[place]))
    elif kind == NICK_:
        _, k = nicknames[doc.pick([token for token, _ in nicknames], CHOICE)]
        which = doc.defer(table((1.0,) * len(TRAITS)))
        doc.trait(k, which)
    elif kind == BACK_:
        _look_back(doc, earlier)
    return kind != STOP_


def _look_back(doc: Document, earlier: list[Scene]) -> None:
    """`first red bo-ka-ti`, or a question about an earlier image: `first ask one top zero`."""
    scene = earlier[doc.pick(ORDINALS[: len(earlier)], CHOICE)]
    if scene.free_sides and doc.defer(EVEN):
        doc.ask_after(scene)
        return
    place = doc.pick([COLOURS[c] for c in scene.colours], CHOICE)
    for token in doc.entities.name_tokens(scene.entities[place]):
        doc.put(token, REFERENCE)
