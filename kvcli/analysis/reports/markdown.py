"""Text and blocks of a report as Markdown; nothing in a name acts as Markdown."""

from __future__ import annotations

from kvcli.analysis.marked import Block, Bullets, Command, Grid, Paragraph, Section, pieces


def section(part: Section) -> list[str]:
    lines = [f"## {inline(part.title)}", ""]
    for block in part.blocks:
        lines += [*_block(block), ""]
    return lines


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [f"> {inline(block.text)}" if block.warning else inline(block.text)]
    if isinstance(block, Bullets):
        return [
            line for text, under in block.items for line in (f"- {inline(text)}", *(f"  - {inline(t)}" for t in under))
        ]
    if isinstance(block, Command):
        return ["```sh", block.text, "```"]
    return _grid(block)


def _grid(grid: Grid) -> list[str]:
    marks = ["---:" if i in grid.right else "---" for i in range(len(grid.head))]
    rows = [grid.head, *grid.rows]
    drawn = ["| " + " | ".join(inline(field, cell=True) for field in row) + " |" for row in rows]
    return [drawn[0], "| " + " | ".join(marks) + " |", *drawn[1:]]


def inline(text: str, *, cell: bool = False) -> str:
    """Text with its marks as Markdown. cell: inside a table, where a pipe would end the cell."""
    drawn = []
    for words, kind in pieces(text):
        if kind == "code":
            drawn.append(as_code(words))
        elif kind == "user":
            drawn.append(escaped(words))
        elif kind == "raised":
            drawn.append(f"<sup>{escaped(words)}</sup>")
        else:
            own = words.replace("|", "\\|") if cell else words
            drawn.append(f"**{_bold(words)}**" if kind == "strong" else own)
    return "".join(drawn)


def _bold(words: str) -> str:
    """Brackets of an interval stay as they are; those of a link do not."""
    plain = escaped(words)
    return plain if "](" in words else plain.replace("\\[", "[").replace("\\]", "]")


def escaped(value: object) -> str:
    """Text of a model, a task or a user that must not act as Markdown."""
    text = " ".join(str(value).split())
    for char in "\\`*<>|[]":
        text = text.replace(char, f"\\{char}")
    return text


def as_code(text: str) -> str:
    """A name as it is typed; pipes would end a table's cell."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
