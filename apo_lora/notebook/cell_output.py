"""What a process prints, as a notebook's cell can show it.

A cell has no cursor: it can add lines and, after a carriage return, write its last line again. So a terminal's screen
is kept here, and once a second the cell gets its finished lines and the newest state of what is still moving.
"""

import codecs
import re
from typing import TextIO

TOKENS = re.compile(r"\n|\r|\x1b\[[0-9;?]*[A-Za-z]|[^\n\r\x1b]+|\x1b")
UNFINISHED = re.compile(r"\x1b(\[[0-9;?]*)?\Z")


class CellOutput:
    """Bars may be nested: tqdm and the Hub's downloads move the cursor down to the inner one and up again."""

    def __init__(self, out: TextIO):
        self.out = out
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        """The beginning of a control sequence."""
        self._rows = [""]
        self._row = self._column = 0
        self._new_line = False
        self._shown = ""
        """What stands in the cell's last line."""

    def write(self, chunk: bytes) -> None:
        """Onto the screen; `show` brings it into the cell."""
        text = self._rest + self._decode(chunk)
        self._rest = unfinished[0] if (unfinished := UNFINISHED.search(text)) else ""
        for token in TOKENS.findall(text.removesuffix(self._rest)):
            if token == "\n":
                self._row, self._column = self._row + 1, 0
                self._rows += [""] * (self._row == len(self._rows))
                self._new_line = True
                continue
            elif token == "\r":
                self._column = 0
            elif token.endswith("A") and token.startswith("\x1b"):  # up
                self._row = max(0, self._row - int(token[2:-1] or 1))
            elif not token.startswith("\x1b"):
                if self._new_line:  # and not a bar, which begins with a carriage return: over what an ended bar left
                    self._rows[self._row] = ""
                row, self._column, start = self._rows[self._row], self._column + len(token), self._column
                self._rows[self._row] = row[:start].ljust(start) + token + row[self._column :]
            self._new_line = False

    def show(self) -> None:
        for line in self._rows[: self._row]:
            self._put(line.rstrip(), end="\n")
        self._rows, self._row = self._rows[self._row :], 0
        moving = next((row.rstrip() for row in reversed(self._rows) if row.strip()), "")
        if moving != self._shown:
            self._put(moving)
        self.out.flush()

    def say(self, line: str) -> None:
        """A line of the notebook's own, above what is moving."""
        self._put(line, end="\n")
        self.show()

    def close(self) -> None:
        """Ends a last line that has no end."""
        self.show()
        if self._shown:
            self.out.write("\n")
        self.out.flush()

    def _put(self, line: str, end: str = "") -> None:
        self.out.write(("\r" if self._shown else "") + line.ljust(len(self._shown)) + end)
        self._shown = "" if end else line
