"""Layers and grids of Altair charts, put together as Vega-Lite specifications.

`alt.layer` and `alt.concat` copy every chart below them, at every level and every property set: half the time of a
report. A `Panel` and a `Grid` keep the charts and join their finished specifications once, when they are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt


def _plain(chart: Any) -> dict[str, Any]:
    """The specification of a part: no schema and no configuration of its own."""
    if isinstance(chart, (Panel, Grid)):
        return chart.part()
    spec: dict[str, Any] = chart.to_dict(validate=False, context={"top_level": False})
    return spec


@dataclass(frozen=True)
class Panel:
    """Charts drawn over one another, the first one lowest; `properties` are width, height (pixels) and title."""

    layers: Sequence[Any]
    properties: dict[str, Any] = field(default_factory=dict)

    def part(self) -> dict[str, Any]:
        """The specification inside another one."""
        return {"layer": [_plain(chart) for chart in self.layers]} | self.properties

    def to_dict(self, validate: bool = True) -> dict[str, Any]:
        """The Vega-Lite specification; `validate` raises altair's SchemaValidationError where it is not one."""
        return _whole(self.part(), validate)


@dataclass(frozen=True)
class Grid:
    """Panels side by side in `columns`, each with its own x and y."""

    panels: Sequence[Any]
    columns: int

    def part(self) -> dict[str, Any]:
        """The specification inside another one."""
        scales = {"x": "independent", "y": "independent"}
        return {
            "concat": [_plain(panel) for panel in self.panels],
            "columns": self.columns,
            "resolve": {"scale": scales},
        }

    def to_dict(self, validate: bool = True) -> dict[str, Any]:
        """The Vega-Lite specification; `validate` raises altair's SchemaValidationError where it is not one."""
        return _whole(self.part(), validate)


def layered(*layers: Any, **properties: Any) -> Panel:
    """A panel of charts over one another with width, height (pixels) and, if given, a title."""
    return Panel(layers, properties)


def grid(panels: Sequence[Any], columns: int) -> Grid:
    """Panels side by side."""
    return Grid(panels, columns)


def _whole(spec: dict[str, Any], validate: bool) -> dict[str, Any]:
    spec = {"$schema": alt.SCHEMA_URL} | spec
    if validate:
        alt.Chart.from_dict(spec, validate=True)
    return spec
