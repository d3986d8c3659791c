"""How figures look: colours of the page, fonts, sizes, and a fixed colour, marker and dash for every method and task.

A look is drawn from the name alone, so it is the same in every folder and beside whatever other methods. The salts
were searched so that methods of tier 1 are apart in colour, in marker and in dashes, the tasks of a testbed and of the
paper's suite in dashes, and all of kvcli's methods, or tasks of one suite, in colour and marker together
(tests/analysis/test_plots_style.py checks that).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from kvcli.errors import KvcliError

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#801262", "#5A3A00", "#666666",
)  # fmt: skip
"""Okabe and Ito's palette without yellow and black, then four darker ones: apart for colour-blind readers, too."""
_DARK = (
    "#28C5FA", "#D27919", "#20AB62", "#FCC8B0", "#FACF37", "#78FFFF", "#A15FF5", "#9F59A5", "#C4E87A", "#9A9AA2",
)  # fmt: skip
"""Ten for a dark page, as far apart."""
_PLACES = (0, 9, 2, 3, 4, 5, 6, 7, 8, 1)
"""Grey is drawn in place of the second colour: it falls to a baseline."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES: tuple[tuple[float, ...], ...] = (
    (), (4, 1.6), (1, 1.3), (5, 1.5, 1, 1.5), (5, 1.3, 1, 1.3, 1, 1.3), (9, 2), (1, 3),
    (4, 1.3, 4, 1.3, 1, 1.3), (8, 1.5, 2.5, 1.5), (4, 1.3, 1, 1.3, 1, 1.3, 1, 1.3),
)  # fmt: skip
"""Dashes and gaps in line widths; the first line has none. All periods are short: lines of three points show theirs."""
SALTS = (1486784, 524984, 25117300)
"""For the colour, the marker and the dashes of a name."""


@dataclass(frozen=True)
class Look:
    """Indices into colours, markers and dashes."""

    colour: int
    marker: int
    dash: int

    @classmethod
    def of(cls, name: str) -> Look:
        colour, marker, dash = (crc32(f"{salt} {name}".encode()) for salt in SALTS)
        # CRCs under two salts differ by a constant: dashes from other bits, or they would follow from the colour.
        return cls(colour % len(COLOURS), marker % len(MARKERS), (dash >> 8) % len(DASHES))

    @property
    def next(self) -> Look:
        """Where this look is taken: another marker, then other dashes."""
        marker = (self.marker + 1) % len(MARKERS)
        return Look(self.colour, marker, self.dash if marker else (self.dash + 1) % len(DASHES))


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    page: str
    ink: str
    muted: str
    grid: str
    alarm: str
    series: tuple[str, ...]
    shades: str
    """matplotlib's colour map for a share from 0 to 1."""
    losses: tuple[str, str, str]
    """Colours of a loss, of no difference, of a gain."""


LIGHT = Theme(
    "light", "#FFFFFF", "#000000", "#555555", "#E4E4E4", "#B00000", tuple(COLOURS[i] for i in _PLACES), "cividis",
    ("#B35806", "#F7F7F7", "#2166AC"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0D1117", "#F0F3F6", "#A8B1BB", "#2D333B", "#FF9492", tuple(_DARK[i] for i in _PLACES), "cividis",
    ("#F08A2C", "#1C2128", "#58A6FF"),
)  # fmt: skip
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


@dataclass(frozen=True)
class Style:
    """Sizes in inches and points. width: of the whole figure, for one column of panels and for more; None: as wide as
    its panels want."""

    name: str
    theme: Theme
    size: float
    """Font size of labels."""
    panel: tuple[float, float]
    width: tuple[float, float] | None
    most_columns: int
    dpi: int
    tallest: float
    """Inches: what is taller goes to further pages."""
    titles: bool = True
    """Whether a page begins with its title and subtitle."""

    @property
    def mark(self) -> float:
        """Size of marks in points."""
        return 4.0 if self.width is None else 3.2

    def colour(self, look: Look) -> str:
        return self.theme.series[look.colour]

    def line(self, look: Look) -> dict[str, Any]:
        """What matplotlib calls them."""
        return {"color": self.colour(look), "marker": MARKERS[look.marker], "linestyle": pattern(look.dash)}

    def rc(self) -> dict[str, Any]:
        """matplotlib's settings for one figure. Fonts are embedded whole (type 42), as publishers ask."""
        theme, small = self.theme, self.size - 0.5
        return {
            "font.family": "DejaVu Sans", "font.size": self.size, "axes.titlesize": self.size + 0.5,
            "axes.labelsize": self.size, "legend.fontsize": self.size, "xtick.labelsize": small,
            "ytick.labelsize": small, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
            "lines.linewidth": 1.2, "lines.markersize": self.mark, "axes.spines.top": False,
            "axes.spines.right": False, "pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none",
            "svg.hashsalt": "kvcli", "figure.facecolor": theme.page, "axes.facecolor": theme.page,
            "savefig.facecolor": theme.page, "savefig.edgecolor": theme.page, "text.color": theme.ink,
            "axes.labelcolor": theme.ink, "axes.edgecolor": theme.ink, "axes.titlecolor": theme.ink,
            "xtick.color": theme.ink, "ytick.color": theme.ink, "legend.labelcolor": theme.ink, "text.usetex": False,
            "axes.unicode_minus": True,
        }  # fmt: skip


STYLES = ("screen", "paper")


def style(name: str = "screen", theme: str = "light", *, titles: bool = True) -> Style:
    """`paper`: one column of 3.25 inches or two columns of 6.75, at most 8.6 high, 7 point type.

    Raises KvcliError for unknown names.
    """
    if name not in STYLES:
        raise KvcliError(f"unknown style '{name}'", given=f"--style {name}", fix=" or ".join(STYLES))
    if theme not in THEMES:
        raise KvcliError(f"unknown theme '{theme}'", given=f"--theme {theme}", fix=" or ".join(THEMES))
    if name == "paper":
        return Style(name, THEMES[theme], 7.0, (1.45, 1.1), (3.25, 6.75), 4, 300, 8.6, titles)
    return Style(name, THEMES[theme], 8.0, (2.25, 1.5), None, 4, 200, 11.0, titles)


def pattern(dash: int) -> Any:
    """The line's dashes as matplotlib takes them."""
    return (0, DASHES[dash]) if DASHES[dash] else "-"


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each name. It depends on the name alone, unless two names of one figure draw the same of the 1,000:
    then the plainer one (no settings, no file) has it."""
    found: dict[str, Look] = {}
    for name in sorted(set(names), key=lambda m: (not m.replace("_", "").islower(), ":" in m, m)):
        look = Look.of(name)
        for _ in range(len(MARKERS) * len(DASHES)):
            if look not in found.values():
                break
            look = look.next
        found[name] = look
    return found
