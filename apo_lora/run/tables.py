"""Tables of words: aligned columns for a terminal, and Markdown. The first row is the heading."""

from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, left: Collection[int] = (0,)) -> list[str]:
    """Lines with columns as wide as their widest cell. The columns numbered in `left` are flush left, the rest flush
    right. A heading without rows gives no lines."""
    if len(rows) < 2:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown(rows: Rows) -> list[str]:
    """Lines of a Markdown table; a bar inside a cell is escaped. A heading without rows gives no lines."""
    if len(rows) < 2:
        return []
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]
