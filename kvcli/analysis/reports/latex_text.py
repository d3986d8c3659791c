"""Text, lists and grids of a report as LaTeX (booktabs); nothing in a name acts as LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kvcli.analysis.marked import Block, Bullets, Grid, Paragraph, Section, pieces, plain

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "[": "{[}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "…": r"\dots{}", "–": "--", "—": "---", "×": r"$\times$",
    "→": r"$\rightarrow$", "≤": r"$\le$", "≥": r"$\ge$", "±": r"$\pm$", "−": "$-$",
}  # fmt: skip
LONG_WORDS = 34
"""A column of a grid with a longer field than this has lines of its own to break into."""
BROKEN_WIDTH = 0.8
"""Of the text's width, what such columns share."""
SIGNS = 76
"""In a line of text as wide as that, in the size of a grid."""
MOST_LINES = 44
"""A grid of more lines than fit on a page goes on in another one: a tabular does not break, and longtable is refused in
papers of two columns."""


def section(part: Section, *, under: bool = True) -> list[str]:
    """under: points with what stands under them."""
    lines = [r"\subsubsection*{" + inline(part.title) + "}"]
    for block in part.blocks:
        lines += _block(block, under)
    return lines


def commented(part: Section) -> list[str]:
    """A section as comments: what a paper need not print, and a reader of its source wants to know."""
    lines = [plain(part.title)]
    for block in part.blocks:
        if isinstance(block, Bullets):
            lines += [f"- {plain(text)}" for text, _ in block.items]
        elif isinstance(block, Grid):
            lines += [": ".join(map(plain, row)) for row in block.rows]
        else:
            lines += plain(block.text).splitlines()
    return [f"% {comment(line)}" for line in lines]


def _block(block: Block, under: bool) -> list[str]:
    if isinstance(block, Paragraph):
        return [inline(block.text), ""]
    if isinstance(block, Bullets):
        return [*_itemize([(text, more if under else ()) for text, more in block.items]), ""]
    if isinstance(block, Grid):
        return [
            text
            for part in _pages(block)
            for text in (r"\noindent{\footnotesize", *fitted(_tabular(block, part)), "}", "")
        ]
    return [r"\begin{verbatim}", block.text, r"\end{verbatim}"]


def _itemize(items: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    lines = [r"\begin{itemize}"]
    for text, more in items:
        lines.append(rf"  \item {inline(text)}")
        lines += _itemize([(one, ()) for one in more]) if more else []
    return [*lines, r"\end{itemize}"]


def fitted(tabular: Sequence[str]) -> list[str]:
    """No wider than the text."""
    return [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%", *tabular[:-1], tabular[-1] + "}"]


def _tabular(grid: Grid, rows: Sequence[Sequence[str]]) -> list[str]:
    shares = _shares(grid)
    widths = {i: f"p{{{share:.2f}\\linewidth}}" for i, share in shares.items()}
    columns = "".join(widths.get(i, "r" if i in grid.right else "l") for i in range(len(grid.head)))
    return ruled(columns, line(*map(inline, grid.head)), [line(*map(inline, row)) for row in rows])


def _shares(grid: Grid) -> dict[int, float]:
    """Columns of words that take several lines, and how much of the text's width each has: by what stands in it."""
    words = {i: [len(plain(row[i])) for row in grid.rows] for i in range(len(grid.head))}
    long = {i: math.sqrt(sum(found)) for i, found in words.items() if max(found, default=0) > LONG_WORDS}
    return {i: BROKEN_WIDTH * size / sum(long.values()) for i, size in long.items()}


def _pages(grid: Grid) -> Iterator[list[Sequence[str]]]:
    """Rows that fit on a page together."""
    room = {i: SIGNS * share for i, share in _shares(grid).items()}
    part: list[Sequence[str]] = []
    used = 0
    for row in grid.rows:
        lines = max([1, *(math.ceil(len(plain(row[i])) / width) for i, width in room.items())])
        if part and used + lines > MOST_LINES:
            yield part
            part, used = [], 0
        part.append(row)
        used += lines
    yield part


def ruled(columns: str, head: str, rows: Sequence[str]) -> list[str]:
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]


def line(*fields: str) -> str:
    return " & ".join(fields) + r" \\"


def small(text: str) -> str:
    return r"{\footnotesize " + text + "}"


def inline(text: str) -> str:
    styles = {"code": r"\texttt{%s}", "strong": r"\textbf{%s}", "raised": r"\textsuperscript{%s}"}
    return "".join(styles.get(kind, "%s") % escaped(words, code=kind == "code") for words, kind in pieces(text))


def escaped(text: str, *, code: bool = False) -> str:
    """Nothing in it acts as LaTeX; signs that pdfLaTeX does not know become a question mark in brackets."""
    drawn = "".join(
        _SPECIAL.get(sign, sign if " " <= sign <= "~" or "\u00a1" <= sign <= "\u00ff" else "[?]") for sign in text
    )
    return drawn.replace(r"\_", r"\_\allowbreak{}").replace("--", "-{}-") if code else drawn


def key(text: str) -> str:
    """For a label."""
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in text)


def comment(text: str) -> str:
    return " ".join(text.split())
