"""What a process prints, in a cell that can only write its last line again."""

import io

import pytest

from apo_lora.notebook.cell_output import CellOutput


class Screen(CellOutput):
    """What a cell shows in the end, and how often it was painted."""

    def __init__(self):
        self.paints = io.StringIO()
        super().__init__(self.paints)

    def lines(self):
        return [line.split("\r")[-1].rstrip() for line in self.paints.getvalue().split("\n")]


@pytest.fixture
def screen():
    return Screen()


def test_a_bar_becomes_its_newest_state_and_stands_once(screen):
    screen.write(b"start\n\rbar  0%\rbar 50%")
    screen.show()
    screen.write("\rbar 100% \u00e9".encode()[:-1])  # half a character
    screen.write("\u00e9".encode()[-1:] + b"\nend")
    screen.close()
    assert screen.lines() == ["start", "bar 100% \u00e9", "end", ""]


def test_a_line_above_a_bar_stands_alone(screen):
    for chunk in (b"\ra long bar 50%", b"\r              \rstep 1\n\ra long bar 60%", b"\ra long bar 99%\n"):
        screen.write(chunk)
        screen.show()
    assert screen.lines() == ["step 1", "a long bar 99%", ""]


def test_many_states_between_two_looks_are_one_paint(screen):
    for percent in range(100):
        screen.write(b"\rbar %d%%" % percent)
    screen.show()
    assert screen.paints.getvalue() == "bar 99%"
    screen.show()
    assert screen.paints.getvalue() == "bar 99%"


def test_nested_bars_are_no_wall_of_lines(screen):
    """tqdm writes an inner bar below the outer one, and goes up again."""
    for percent in range(0, 100, 10):
        screen.write(b"\router %d%%" % percent)
        screen.write(b"\n\rinner %d%%\x1b[" % (100 - percent))
        screen.write(b"A")
        screen.show()
    screen.write(b"\router 100%\ndone\n")
    screen.close()
    assert screen.lines() == ["outer 100%", "done", ""]


def test_the_notebook_s_own_line_stands_above_the_bar(screen):
    screen.write(b"\rbar 10%")
    screen.show()
    screen.say("2 s per step")
    screen.write(b"\rbar 20%\n")
    screen.close()
    assert screen.lines() == ["2 s per step", "bar 20%", ""]


def test_colours_and_a_bare_escape_do_no_harm(screen):
    screen.write(b"\x1b[31mred\x1b[0m and \x1bplain\x1b[2A\n")
    screen.close()
    assert screen.lines() == ["red and plain", ""]
