"""Text that arrives in pieces, wrapped into columns of a terminal: one beside the other, or one below the other."""

import re
import unicodedata
from typing import TextIO

GAP = 3
"""Cells between two columns."""
NARROWEST = 80
"""Cells that a terminal must have for two columns."""


class Column:
    """Writes text to `out` as it comes, wrapped at `width` cells, every line starting `indent` cells from the left.

    With width None, text is not wrapped. Control characters, which a model may write, are left out: a terminal would
    obey them.
    """

    def __init__(self, out: TextIO, width: int | None, indent: int = 0):
        self.out, self.width, self.indent = out, width, indent
        self.height = 1
        """Lines begun."""
        self._used = 0
        if indent:
            out.write(f"\x1b[{indent}C")

    def put(self, text: str) -> None:
        text = "".join(c for c in text.replace("\t", "    ") if c.isprintable() or c == "\n")
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            if piece == "\n":
                self._new_line()
            elif self._fits(piece):
                self._write(piece)
            elif not piece.isspace():
                if self._used:
                    self._new_line()
                for character in piece:  # a word may be wider than the column
                    if not self._fits(character):
                        self._new_line()
                    self._write(character)
        self.out.flush()

    def _fits(self, text: str) -> bool:
        return self.width is None or self._used + cells(text) <= self.width

    def _write(self, text: str) -> None:
        self.out.write(text)
        self._used += cells(text)

    def _new_line(self) -> None:
        self.out.write("\n" + (f"\x1b[{self.indent}C" if self.indent else ""))
        self.height += 1
        self._used = 0


def cells(text: str) -> int:
    """Width on a terminal: Chinese, Japanese and Korean signs take two cells, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class SideBySide:
    """Two columns of which the first is written whole and then the second, beside it where there is room for that.

    `size` is (columns, lines) of the terminal, None where the reader is none: then no escape sequence is written.
    A first column that is taller than the terminal has scrolled away; the second goes below it.
    """

    def __init__(self, out: TextIO, size: tuple[int, int] | None):
        self.out, self.size = out, size
        self._wide = size is not None and size[0] >= NARROWEST
        self._first: Column | None = None

    def first(self, title: str) -> Column:
        self._first = self._column(title, 0, (self.size[0] - GAP) // 2 if self._wide else None)
        return self._first

    def second(self, title: str) -> Column:
        first = self._first
        if not self._wide or first.height >= self.size[1]:
            self.out.write("\n\n")
            return self._column(title, 0, first.width)
        if first.height > 1:
            self.out.write(f"\x1b[{first.height - 1}A")
        self.out.write("\r")
        return self._column(title, first.width + GAP, first.width)

    def _column(self, title: str, indent: int, width: int | None) -> Column:
        column = Column(self.out, width, indent)
        column.put(f"{title}\n\n")
        return column

    def end(self, second: Column) -> None:
        """The cursor to the line below both."""
        if second.indent and self._first.height > second.height:
            self.out.write(f"\x1b[{self._first.height - second.height}B")
        self.out.write("\n")
        self.out.flush()
