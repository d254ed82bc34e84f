"""Caption documents: one image, described; two or three questions that need both modalities, before or after it."""

from __future__ import annotations

from isofusion.data.world.choice import table
from isofusion.data.world.document import Document
from isofusion.data.world.scene import CAPTION_COUNT
from isofusion.data.world.vocab import GRAMMAR, STOP

EVEN = table((0.5, 0.5))
P_SIGN = 0.4
LONGEST = 1 + 6 * (4 + 2) + 2 + 1 + 4 + 3 * 5 + 3  # describe, sign, stop, relate, questions and answers, rim
"""Most text tokens of a caption document, BOS and EOS apart."""


def write_caption(doc: Document) -> None:
    """[ask ...] image [answers] description . [from ...] rim ... [ask ... answer]

    Of the four sides two or three are asked about and the others read out: reading a side teaches where to look.
    """
    before = doc.structure(EVEN)
    questions, sides = [], [0, 1, 2, 3]
    if before:
        # every slot here is followed by `ask` or by the image, which is not a target: `ask` is certain given text
        questions = [doc.question(sides) for _ in range(2 + doc.structure(EVEN))]
    scene = doc.look(CAPTION_COUNT, P_SIGN)
    scene.free_sides = sides
    doc.answer(scene, questions)
    doc.describe(scene, traits=True)
    doc.put(STOP, GRAMMAR)
    if len(scene.entities) > 1 and doc.defer(EVEN):
        doc.relate(scene)
    if before:
        while scene.free_sides:
            doc.read_rim(scene)
        return
    doc.read_rim(scene)
    if doc.defer(EVEN):
        doc.read_rim(scene)
    while scene.free_sides:
        doc.ask_after(scene)
