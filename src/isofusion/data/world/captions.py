"""Caption documents: one image, described; a question that needs both modalities, before or after it."""

from __future__ import annotations

from isofusion.data.world.choice import EVEN, table
from isofusion.data.world.document import Document
from isofusion.data.world.scene import CAPTION_COUNT
from isofusion.data.world.vocab import GRAMMAR, STOP

P_SIGN = 0.1  # reading a drawn numeral is learnt by luck of the seed: rare, so that luck does not decide a loss
RELATE = table((0.75, 0.25))  # say where one entity is seen from another: a skill that small models never learn
P_SUM = 0.5  # chance of an addition in words before a question
LONGEST = 1 + 6 * (4 + 2) + 2 + 1 + 4 + 3 + 5 + 4  # describe, sign, stop, relate, rim, question and answer, sum
"""Most text tokens of a caption document, BOS and EOS apart."""


def write_caption(doc: Document) -> None:
    """[ask ...] image [answers] description . [from ...] rim ... [ask ... answer]

    Of the two bars one is asked about and the other read out: reading a bar teaches where to look.
    """
    before = doc.structure(EVEN)
    questions, sides = [], [0, 1]
    if before:
        # every slot here is followed by `ask` or by the image, which is not a target: `ask` is certain given text
        questions = [doc.question(sides, P_SUM)]
    scene = doc.look(CAPTION_COUNT, P_SIGN)
    scene.free_sides = sides
    doc.answer(scene, questions)
    doc.describe(scene, traits=True)
    doc.put(STOP, GRAMMAR)
    if len(scene.entities) > 1 and doc.defer(RELATE):
        doc.relate(scene)
    doc.read_rim(scene)
    if not before:
        doc.ask_after(scene, P_SUM)
