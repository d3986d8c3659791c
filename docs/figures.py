"""Draws the figures of the README from a run of the testbed, for light and dark pages, in 256 colours.

kvcli sweep --method tier1 --ratio 0.1..0.9:0.2 --limit 100 --out runs/first
python docs/figures.py runs/first
"""

from __future__ import annotations

import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from PIL import Image

from kvcli.analysis.figures.kinds import chosen
from kvcli.analysis.figures.style import THEMES, style
from kvcli.analysis.figures.views import filtered
from kvcli.analysis.load import load_run
from kvcli.analysis.plots import plot

IMAGES = Path(__file__).parent / "images"
FIGURES = {"testbed": ("difference", ()), "testbed-heatmap": ("heatmap", ("0.1", "0.3"))}
"""File name -> kind, and the requested ratios where not all are shown."""


def main(folder: Path) -> None:
    run = load_run(folder)
    for name, (kind, ratios) in FIGURES.items():
        part = filtered(run, (), (), [Decimal(ratio) for ratio in ratios])
        for theme in THEMES:
            with tempfile.TemporaryDirectory() as temporary:
                plot(part, Path(temporary), ("png",), kinds=chosen([kind]), look=style("screen", theme))
                picture = Image.open(Path(temporary) / f"{kind}-compressed.png").convert("RGB")
            suffix = "" if theme == "light" else f"-{theme}"
            picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(IMAGES / f"{name}{suffix}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
