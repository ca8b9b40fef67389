"""Draws the loss curve of a run as a self-contained SVG that is readable on light and dark backgrounds.

    python benchmarks/plot_run.py outputs/debug docs/loss.svg

The curve is `loss` of the run's metrics.jsonl by step, without smoothing. Validation losses are dots. The script needs
no plotting library.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import common  # noqa: F401 (finds the package)

from quadriga.metrics.jsonl import read_metrics

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 52, 48
TICKS = 6

# Colours with a contrast of at least 3 on white and on near-black. The background is that of the page.
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #7d8590; font-size: 13px }
.title { font-size: 15px; font-weight: 600; fill: #1f77d0 }
.grid { stroke: #7d8590; stroke-opacity: 0.25; stroke-width: 1 }
.curve { fill: none; stroke: #1f77d0; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.end { fill: #1f77d0 }
.validation { fill: #d9731a }
"""


@dataclass(frozen=True)
class Axis:
    """Maps values `low`..`high` to pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values in the range, about TICKS of them."""
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * count for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


Points = list[tuple[float, float]]


def draw(title: str, curve: Points, validation: Points) -> str:
    """The SVG. `curve` and `validation`: (step, loss)."""
    losses = [loss for _, loss in curve + validation]
    margin = 0.06 * (max(losses) - min(losses)) or 0.5
    across = Axis(0, max(step for step, _ in curve), LEFT, WIDTH - RIGHT)
    down = Axis(min(losses) - margin, max(losses) + margin, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        *grid(across, down),
        f'<polyline class="curve" points="{" ".join(coordinates(point, across, down, ",") for point in curve)}"/>',
        *(dot(point, across, down, "validation", 3.5) for point in validation),
        *last_loss(curve, across, down),
        *legend(bool(validation)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def grid(across: Axis, down: Axis) -> list[str]:
    """Grid lines at the ticks of the loss, and labels of both axes."""
    parts = []
    for loss in down.ticks():
        y = down.at(loss)
        parts.append(f'<line class="grid" x1="{across.start}" y1="{y:.1f}" x2="{across.end}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in across.ticks():
        if step == int(step):
            parts.append(f'<text x="{across.at(step):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{step:,.0f}</text>')
    middle = (across.start + across.end) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">optimizer steps</text>')
    return parts


def coordinates(point: tuple[float, float], across: Axis, down: Axis, between: str) -> str:
    return f"{across.at(point[0]):.1f}{between}{down.at(point[1]):.1f}"


def dot(point: tuple[float, float], across: Axis, down: Axis, kind: str, radius: float) -> str:
    return f'<circle class="{kind}" cx="{across.at(point[0]):.1f}" cy="{down.at(point[1]):.1f}" r="{radius}"/>'


def last_loss(curve: Points, across: Axis, down: Axis) -> list[str]:
    """A dot at the end of the curve, with its loss below it, where a falling curve leaves space."""
    x, y = across.at(curve[-1][0]), down.at(curve[-1][1])
    label = f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="end">{curve[-1][1]:.3f}</text>'
    return [dot(curve[-1], across, down, "end", 3.5), label]


def legend(has_validation: bool) -> list[str]:
    """The legend to the right of the title: only the unit if there are no validation losses."""
    right = WIDTH - RIGHT
    if not has_validation:
        return [f'<text x="{right}" y="24" text-anchor="end">training loss, nats per token</text>']
    return [
        f'<text x="{right}" y="24" text-anchor="end">loss in nats per token:</text>',
        f'<line class="curve" x1="{right - 176}" y1="38" x2="{right - 154}" y2="38"/>',
        f'<text x="{right - 148}" y="42">training</text>',
        f'<circle class="validation" cx="{right - 80}" cy="38" r="3.5"/>',
        f'<text x="{right}" y="42" text-anchor="end">validation</text>',
    ]


def read_points(file: Path, kind: str) -> Points:
    return [(record["step"], record["loss"]) for record in read_metrics(file, kind) if math.isfinite(record["loss"])]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run as an SVG.")
    parser.add_argument("run_folder", type=Path, help="the run's dump_folder, with metrics.jsonl")
    parser.add_argument("out", type=Path, help="the SVG to write")
    parser.add_argument("--title", help="default: the name of the run folder")
    chosen = parser.parse_args()
    file = chosen.run_folder / "metrics.jsonl"
    if not file.is_file():
        parser.error(f"{file}: there is no such file")
    curve = read_points(file, "train")
    if not curve:
        parser.error(f"{file}: all training losses are NaN or infinite")
    svg = draw(chosen.title or chosen.run_folder.resolve().name, curve, read_points(file, "validation"))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(svg, encoding="utf-8")
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
