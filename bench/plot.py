"""Draw what `bench/snapshots.py --json` found: ours beside QEMU's, as an SVG that reads on light and on dark.

    .venv/bin/python bench/plot.py build/bench/snapshots.json docs/snapshots.svg

One line for each work that both sides do and that takes time: the medians as bars over a logarithmic scale of milliseconds.
"""

import argparse
import json
import math
import statistics
from html import escape
from pathlib import Path
from typing import Any

_WIDTH, _LABELS, _RIGHT, _LINE, _BAR, _HEAD = 960, 420, 70, 34, 11, 46
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.ours { fill: #0969da } .theirs { fill: #8c959f } .grid { stroke: #d0d7de } .value { font-size: 11px }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .ours { fill: #4493f8 } .theirs { fill: #6e7681 } .grid { stroke: #30363d }
}
"""


def drawing(found: dict[str, Any]) -> str:
    """:param found: what --json wrote. :return: the SVG. :raise SystemExit: nothing in it has both sides."""
    lines = [
        (row["work"], statistics.median(row["ours"]), statistics.median(row["theirs"]))
        for row in found["rows"]
        if row["unit"] == "ms" and row["ours"] and row["theirs"]
    ]
    if not lines:
        raise SystemExit("there is nothing that both sides have done")
    figures = [figure for _, *both in lines for figure in both]
    low, high = math.floor(math.log10(min(figures))), math.ceil(math.log10(max(figures)))
    scale = (_WIDTH - _LABELS - _RIGHT) / max(1, high - low)

    def across(value: float) -> float:
        return max(1.0, (math.log10(value) - low) * scale)

    height = _HEAD + _LINE * len(lines) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>Snapshots: stillframe beside QEMU, milliseconds</title>",
        f"<style>{_STYLE}</style>",
        (
            f'<rect class="ours" x="{_LABELS}" y="6" width="11" height="11"/>'
            f'<text x="{_LABELS + 16}" y="16">stillframe</text>'
        ),
        (
            f'<rect class="theirs" x="{_LABELS + 100}" y="6" width="11" height="11"/>'
            f'<text x="{_LABELS + 116}" y="16">QEMU\'s own snapshots</text>'
        ),
    ]
    for power in range(low, high + 1):
        x = _LABELS + (power - low) * scale
        parts.append(f'<line class="grid" x1="{x:.0f}" x2="{x:.0f}" y1="{_HEAD - 4}" y2="{height - 4}"/>')
        parts.append(f'<text x="{x:.0f}" y="{_HEAD - 9}" text-anchor="middle">{10.0**power:,g} ms</text>')
    for number, (work, *both) in enumerate(lines):
        top = _HEAD + number * _LINE
        parts.append(f'<text x="{_LABELS - 8}" y="{top + 16}" text-anchor="end">{escape(work)}</text>')
        for kind, value, y in zip(("ours", "theirs"), both, (top, top + _BAR + 1), strict=True):
            parts.append(
                f'<rect class="{kind}" x="{_LABELS}" y="{y}" width="{across(value):.1f}" height="{_BAR}"/>'
                f'<text class="value" x="{_LABELS + across(value) + 4:.1f}" y="{y + 10}">{value:,.3g}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Parse the command line, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("found", type=Path, help="what `bench/snapshots.py --json` wrote")
    parser.add_argument("svg", type=Path, help="where to draw")
    asked = parser.parse_args()
    asked.svg.write_text(drawing(json.loads(asked.found.read_text())))


if __name__ == "__main__":
    main()
