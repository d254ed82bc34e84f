"""Images: decode with a check, lay on white, resize square, cut into patches; and the dHash of the duplicate count.

n patches per image, p patch side. dHash: 8 x 8 signs of horizontal differences of a 9 x 8 grey thumbnail (Krawetz).
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")  # Pillow names the object it read from; no two runs agree on that


class BrokenImage(ValueError):
    """The bytes are no image that can be decoded in full; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """Encoded bytes -> u8 [height, width, 3]; alpha and palette transparency are laid on white.

    Decodes every pixel, so a truncated file fails here. Raises BrokenImage.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            return _rgb(image)
    except UnidentifiedImageError as error:
        raise BrokenImage(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes: all of them mean "broken"
        raise BrokenImage(f"{type(error).__name__}: {ADDRESS.sub('', str(error))[:120]}") from error


def _rgb(image: Image.Image) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: keep the high byte, do not clip
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def to_patches(pixels: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
    """u8 [H, W, 3] of any size -> u8 [n, p*p*3], resized square (bicubic, antialiased), patches row by row."""
    if pixels.shape[:2] != (image_size, image_size):
        from PIL import Image

        pixels = np.asarray(Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC))
    g, p = image_size // patch_size, patch_size
    return np.ascontiguousarray(pixels.reshape(g, p, g, p, 3).transpose(0, 2, 1, 3, 4)).reshape(g * g, p * p * 3)


def from_patches(patches: np.ndarray, patch_size: int) -> np.ndarray:
    """Inverse of the cut: u8 [n, p*p*3] -> u8 [S, S, 3]."""
    g, p = round(len(patches) ** 0.5), patch_size
    return np.ascontiguousarray(patches.reshape(g, g, p, p, 3).transpose(0, 2, 1, 3, 4)).reshape(g * p, g * p, 3)


def dhash(pixels: np.ndarray) -> int:
    """64-bit difference hash; equal pictures at other sizes or qualities differ in a few bits."""
    from PIL import Image

    small = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    grey = np.asarray(small).astype(np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
