"""What the world looks like: a contact sheet for people, and its measured statistics."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from isofusion.data.sample import DOMAINS, Image, Sample, Text
from isofusion.data.world.world import World
from isofusion.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

TILE, GAP, LINE = 240, 24, 19  # px


def statistics(world: World, domain: str, n: int = 500, seed: int = 0) -> dict[str, Any]:
    """Means over n documents: slots, image share, oracle nats per target (EOS included), per class counts and nats."""
    slots = patches = exposures = lookups = 0
    count, nats = np.zeros(len(world.CLASSES)), np.zeros(len(world.CLASSES))
    for i in range(n):
        sample = world.sample(seed, domain, 0, i)
        slots += 2
        for segment in sample.segments:
            if isinstance(segment, Image):
                patches += world.patches_per_image
                slots += world.patches_per_image
                continue
            assert segment.ids is not None
            assert segment.token_class is not None
            assert segment.oracle is not None
            slots += len(segment.ids)
            np.add.at(count, segment.token_class, 1)
            np.add.at(nats, segment.token_class, segment.oracle)
        count[sample.meta["eos_class"]] += 1
        nats[sample.meta["eos_class"]] += sample.meta["eos_oracle"]
        exposures += sample.meta["exposures"]
        lookups += len(sample.meta["lookups"])
    classes = {
        name: {"share": float(count[c] / count.sum()), "oracle": float(nats[c] / count[c])}
        for c, name in enumerate(world.CLASSES)
        if count[c]
    }
    return {
        "documents": n,
        "slots_per_document": slots / n,
        "targets_per_document": float(count.sum() / n),
        "image_share": patches / slots,
        "oracle_per_target": float(nats.sum() / count.sum()),
        "exposures_per_1000_slots": 1000 * exposures / slots,
        "lookups_per_document": lookups / n,
        "classes": classes,
    }


def written(world: World, sample: Sample) -> str:
    """The words of a document, with [image] where an image stands."""
    return " ".join(
        world.tokenizer.decode(s.ids) if isinstance(s, Text) and s.ids is not None else "[image]"
        for s in sample.segments
    )


def contact_sheet(world: World, n: int = 12, seed: int = 0) -> PilImage:
    """n captions under their images, three interleaved documents and three texts, as one RGB image."""
    try:
        from PIL import Image as Pil
        from PIL import ImageDraw, ImageFont
    except ImportError as error:
        raise InputError("drawing a contact sheet needs Pillow: pip install 'isofusion[train]'") from error
    font, bold = ImageFont.load_default(15), ImageFont.load_default(20)
    columns = 4
    width = columns * (TILE + GAP) + GAP
    blocks: list[tuple[list[np.ndarray], list[str]]] = []  # images side by side, lines beneath
    rows: list[list[tuple[list[np.ndarray], list[str]]]] = []
    for start in range(0, n, columns):
        blocks = []
        for i in range(start, min(n, start + columns)):
            sample = world.sample(seed, "caption", 0, i)
            blocks.append((_images(sample), textwrap.wrap(written(world, sample), 31)))
        rows.append(blocks)
    for domain in ("interleaved", "text"):
        for i in range(3):
            sample = world.sample(seed, domain, 0, i)
            rows.append([(_images(sample), textwrap.wrap(written(world, sample), 135))])
    heights = [max((TILE if b[0] else 0) + LINE * len(b[1]) for b in blocks) + GAP + 8 for blocks in rows]
    sheet = Pil.new("RGB", (width, sum(heights) + 3 * 40 + GAP), (205, 205, 205))
    pen = ImageDraw.Draw(sheet)
    y = GAP
    titles = {0: DOMAINS[0], len(rows) - 6: DOMAINS[1], len(rows) - 3: DOMAINS[2]}
    for r, (blocks, height) in enumerate(zip(rows, heights, strict=True)):
        if r in titles:
            pen.text((GAP, y), titles[r], font=bold, fill=(0, 0, 0))
            y += 40
        for b, (images, lines) in enumerate(blocks):
            for j, pixels in enumerate(images):
                tile = Pil.fromarray(pixels).resize((TILE, TILE), Pil.Resampling.NEAREST)
                sheet.paste(tile, (GAP + (b + j) * (TILE + GAP), y))
            top = y + (TILE + 8 if images else 0)
            for number, line in enumerate(lines):
                pen.text((GAP + b * (TILE + GAP), top + number * LINE), line, font=font, fill=(30, 30, 30))
        y += height
    return sheet


def _images(sample: Sample) -> list[np.ndarray]:
    return [s.pixels for s in sample.segments if isinstance(s, Image)]
