"""The built-in world: a deterministic, endless source of documents whose entropy is known (docs/world.md).

`World.sample(split_seed, domain, block, i)` is a pure function of the world's config and its four arguments: Philox
with key (world seed, split seed) and counter (domain, block, i, 0). The structure (names, glyphs, traits, rules)
depends on `WorldConfig.seed` alone. `oracle` on every token is -log p given everything visible before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from isofusion.config import WorldConfig
from isofusion.data.sample import DOMAINS, Sample
from isofusion.data.world import bound, captions, interleaved, text
from isofusion.data.world import entities as entities_module
from isofusion.data.world.choice import Chooser
from isofusion.data.world.document import Document
from isofusion.data.world.scene import Renderer
from isofusion.data.world.vocab import CLASSES, MOD, WorldTokenizer
from isofusion.errors import InputError

VERSION = 4
"""Raise it when any document changes: it is part of the digest that caches and fingerprints use."""

CHANCE: dict[str, float | None] = {
    **dict.fromkeys(CLASSES),
    "lookup": math.log(entities_module.N_SYLLABLES),
    "spatial": math.log(4),
    "count": math.log(6),
    "tone": math.log(MOD),
    "fusion-after": math.log(MOD),
    "fusion-before": math.log(MOD),
}


class World:
    """The world at one image size. `max_len` bounds every document in slots, BOS and EOS included.

    Raises InputError where an image and the longest caption do not fit in `max_len`, or the image is too small.
    """

    CLASSES = CLASSES
    tokenizer = WorldTokenizer()
    chance = CHANCE
    """Nats per token of a guess among the possible answers, per class; None where that means nothing."""

    def __init__(self, cfg: WorldConfig, image_size: int = 48, patch_size: int = 8, max_len: int = 250) -> None:
        if cfg.seed < 0:
            raise InputError(f"world seed {cfg.seed} is negative; use 0 or more")
        if image_size % patch_size:
            raise InputError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.cfg, self.image_size, self.patch_size, self.max_len = cfg, image_size, patch_size, max_len
        self.patches_per_image = (image_size // patch_size) ** 2
        need = self.patches_per_image + 2 + max(captions.LONGEST, interleaved.BODY)
        if max_len < need:
            raise InputError(
                f"a world caption can take {need} slots ({self.patches_per_image} of them patches), "
                f"more than max_len {max_len}; raise the row length or patch_size, or lower image_size"
            )
        self._renderer = Renderer(image_size)

    @cached_property
    def entities(self) -> entities_module.Entities:
        return entities_module.build(self.cfg)

    @cached_property
    def _rules(self) -> text.Rules:
        return text.Rules(self.cfg.seed)

    @cached_property
    def digest(self) -> str:
        """sha256 of all that decides a document but the arguments of `sample`."""
        facts = [VERSION, self.cfg.model_dump(mode="json"), self.image_size, self.patch_size, self.max_len]
        return hashlib.sha256(json.dumps([facts, self.tokenizer.digest], sort_keys=True).encode()).hexdigest()

    def document(self, chooser: Chooser) -> Document:
        """An empty document; with a chooser of one's own, for tests that enumerate."""
        return Document(chooser, self.max_len, self.patches_per_image, self.entities, self._renderer)

    def write(self, domain: str, doc: Document) -> None:
        """Writes one document of `domain`."""
        if domain == "caption":
            captions.write_caption(doc)
        elif domain == "interleaved":
            interleaved.write_interleaved(doc)
        elif domain == "text":
            text.write_text(doc, self._rules)
        else:
            raise InputError(f"the world has no domain {domain!r}; use one of {', '.join(DOMAINS)}")

    def sample(self, split_seed: int, domain: str, block: int, i: int) -> Sample:
        """Document i of a block. BOS and EOS are not in the segments: packing adds them.

        meta: `eos_oracle` (nats) and `eos_class` of EOS as a target; `text_nats`, f32 per text token
        and EOS, -log p given the text before it and no image; `lookups`, the entities whose names are read off a glyph,
        first mentions only; `exposures`, how many entity draws the document names.
        """
        if domain not in DOMAINS:
            raise InputError(f"the world has no domain {domain!r}; use one of {', '.join(DOMAINS)}")
        if min(split_seed, block, i) < 0:
            raise InputError(f"split_seed {split_seed}, block {block} and i {i} must not be negative")
        key = np.array([self.cfg.seed, split_seed], dtype=np.uint64)
        counter = np.array([0, i, block, DOMAINS.index(domain)], dtype=np.uint64)
        doc = self.document(Chooser(np.random.Philox(key=key, counter=counter)))
        self.write(domain, doc)
        return doc.finish(f"world:{split_seed}:{domain}:{block}:{i}")

    def learner_bound(self, exposures: float, lookups: Iterable[int] | None = None) -> float:
        """Least excess over the oracle in nats per name after n exposures; see `bound.learner_bound`."""
        return bound.learner_bound(self.entities, exposures, lookups)
