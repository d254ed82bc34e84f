"""The built-in procedural image-text world (docs/world.md)."""

from __future__ import annotations

from isofusion.data.world.vocab import CLASSES, WorldTokenizer
from isofusion.data.world.world import World

__all__ = ["CLASSES", "World", "WorldTokenizer"]
