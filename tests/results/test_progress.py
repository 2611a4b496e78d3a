"""Progress bars are for people: a terminal or a notebook, not a log file."""

import sys

import pytest

from tda_lightning.results.progress import progress_bar


class Terminal:
    """A standard error that is a terminal, or not."""

    def __init__(self, is_terminal):
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("is_terminal", "shown", "disabled", "expected"),
    [
        (True, True, "", True),
        (True, True, "0", True),
        (True, True, "1", False),
        (True, False, "", False),
        (False, True, "", False),
    ],
    ids=["terminal", "not disabled", "disabled", "not wanted", "log file"],
)
def test_a_bar_is_shown_where_somebody_sees_it(monkeypatch, is_terminal, shown, disabled, expected):
    terminal = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    assert list(progress_bar(range(3), "counting", "step", shown=shown)) == [0, 1, 2]
    assert ("counting" in terminal.text) is expected


def test_a_notebook_sees_a_bar(monkeypatch):
    terminal = Terminal(False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert list(progress_bar(iter(range(3)), "counting", "step", shown=True, total=3)) == [0, 1, 2]
    assert "counting" in terminal.text
