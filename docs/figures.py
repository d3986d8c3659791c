"""Draws the figures of the README from a run of the testbed, for light and dark pages.

Lines are stored in 256 colours; a heat map is not, because fewer would tilt its scale.

kvcli sweep --method tier1 --ratio 0.1..0.9:0.2 --limit 100 --out runs/first
python docs/figures.py runs/first
"""

from __future__ import annotations

import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from PIL import Image

from kvcli.analysis.figures.files import plot
from kvcli.analysis.figures.kinds import chosen
from kvcli.analysis.figures.style import THEMES, style
from kvcli.analysis.figures.views import filtered
from kvcli.analysis.reading.load import load_run

IMAGES = Path(__file__).parent / "images"
FIGURES = {"testbed": ("difference", ()), "testbed-heatmap": ("heatmap", ("0.1", "0.3"))}
"""File name -> kind, and the requested ratios where not all are shown."""


def main(folder: Path, images: Path = IMAGES) -> None:
    run = load_run(folder)
    for name, (kind, ratios) in FIGURES.items():
        part = filtered(run, (), (), [Decimal(ratio) for ratio in ratios])
        for theme in THEMES:
            with tempfile.TemporaryDirectory() as temporary:
                look = style("screen", theme)
                first, *_ = plot(part, Path(temporary), ("png",), kinds=chosen([kind]), look=look, whole=run)
                picture = Image.open(first).convert("RGB")
            suffix = "" if theme == "light" else f"-{theme}"
            if kind != "heatmap":
                picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE)
            picture.save(images / f"{name}{suffix}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
