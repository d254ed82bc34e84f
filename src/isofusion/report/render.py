"""Vega-Lite specification -> SVG and PNG through vl-convert: no browser, no network, fonts that come with it."""

from __future__ import annotations

import itertools
import re
import threading
from typing import Any

import vl_convert as vlc

_SCHEMA = re.compile(r"/vega-lite/v(\d+(?:\.\d+)?)")
_count = itertools.count()


def warm() -> None:
    """Start the drawing engine (most of a second) in a thread, while what is to be drawn is still computed."""
    threading.Thread(target=vlc.vegalite_to_svg, args=({"data": {"values": [{}]}, "mark": "point"},)).start()


def svg(spec: dict[str, Any]) -> str:
    """The drawing as a standalone SVG file's text."""
    found = _SCHEMA.search(spec.get("$schema", ""))
    text: str = vlc.vegalite_to_svg(spec, vl_version=found[1] if found else None)
    return _POINT.sub("", _RAISED.sub(_raise, text))


_POINT = re.compile(r'<path\b[^>]*\bd="M([-+.,\de]+)(?:L\1)*Z?"[^>]*/>')
"""A line that ends where it begins, of one run for example: it shows nothing, and the painter complains on stderr."""

_PLAIN = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "−0123456789")
_RAISED = re.compile("([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)(?=</text>)")


def _raise(found: re.Match[str]) -> str:
    """Superscript characters as small raised digits: most fonts lack some of the characters."""
    return f'<tspan dy="-0.45em" font-size="75%">{found[1].translate(_PLAIN)}</tspan>'


def png(drawing: str, scale: float = 2.0) -> bytes:
    """A drawn SVG at `scale` pixels per CSS pixel."""
    data: bytes = vlc.svg_to_png(drawing, scale=scale)
    return data


_BETWEEN = re.compile("(>[^<>]+<)")
_FINE = re.compile(r"(?<=\.\d\d)\d+")


def inline(text: str, label: str) -> str:
    """An SVG file's text made fit to stand inside a page: ids of its own, width that follows the column, a label."""
    prefix = f"f{next(_count)}-"
    text = re.sub(r"<\?xml[^>]*\?>|<!DOCTYPE[^>]*>", "", text).strip()
    text = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{prefix}{m[1]}"', text)
    text = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{prefix}{m[1]})", text)
    text = re.sub(r'xlink:href="#([^"]+)"', lambda m: f'xlink:href="#{prefix}{m[1]}"', text)
    # hundredths of a pixel are enough; only inside tags, since labels between them are numbers too
    pieces = _BETWEEN.split(text)
    pieces[::2] = [_FINE.sub("", piece) for piece in pieces[::2]]
    text = "".join(pieces)
    head = re.match(r"<svg\b[^>]*>", text)
    if not head:
        return text
    width = re.search(r'\bwidth="([\d.]+)"', head[0])
    size = f' style="max-width:{float(width[1]):.0f}px"' if width else ""
    opening = re.sub(r'\s(width|height)="[^"]*"', "", head[0])
    opening = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", opening)  # a page's inline SVG needs none
    opening = opening.replace("<svg", f'<svg role="img" aria-label="{label}"{size}', 1)
    return opening + text[head.end() :]
