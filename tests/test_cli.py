"""The command line: its output, and one line per error."""

import subprocess
import sys

import pytest
from lightning_models import Plain, loader, quiet_trainer, vectors
from torch import nn

from tda_lightning import GradientRecorder
from tda_lightning.cli import main


class PartlyRecorded(nn.Module):
    """A network of which only the head is recorded."""

    def __init__(self):
        super().__init__()
        self.gate = nn.PReLU(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.gate(x))


@pytest.fixture
def run(tmp_path):
    recorder = GradientRecorder(tmp_path / "run", every_n_steps=2, layers=["net.head"])
    with pytest.warns(UserWarning, match="not recorded"):
        quiet_trainer(recorder).fit(Plain(PartlyRecorded()), loader(vectors()))
    return tmp_path / "run"


def test_info_lists_recorded_and_left_out_layers(run, capsys):
    assert main(["info", str(run)]) == 0
    output = capsys.readouterr().out
    for expected in (
        "a recording of `Plain`",
        "3 (index 0 to 4, one in 2), epochs 0 to 1",
        "of 13 in the training set",
        "SGD, learning rate 0.1",
        "MiB",
        "net.head.weight  Linear  21          67.7%  recorded",
        "net.head.bias    Linear  3           9.7%   recorded",
        "net.gate         PReLU   7           22.6%  LEFT OUT: not among `layers`",
    ):
        assert expected in output, output


def test_audit_shows_how_much_the_rows_explain(tmp_path, capsys):
    recorder = GradientRecorder(tmp_path / "run", audit=2, layers=["net.head"])
    with pytest.warns(UserWarning, match="not recorded"):
        quiet_trainer(recorder).fit(Plain(PartlyRecorded()), loader(vectors()))
    assert main(["audit", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 of 6 steps audited" in lines[0]
    for line, name in zip(lines[2:4], ("net.head.weight", "net.head.bias"), strict=True):
        assert line.split()[:4] == [name, "Linear", "100.00%", "100.00%"]
    overall = float(lines[4].split()[-2].rstrip("%"))
    assert 0 < overall < 100
    assert lines[5].split()[-2:] == ["100.00%", "100.00%"]


def test_errors_are_one_line_and_an_exit_code(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nowhere")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "There is no run at" in captured.err


def test_an_empty_run_can_be_described(run, capsys):
    for file in (*run.glob("segment-*"), run / "manifest.jsonl"):
        file.unlink()
    assert main(["info", str(run)]) == 0
    assert "none yet" in capsys.readouterr().out


def test_the_command_is_installed(run):
    command = [sys.executable, "-m", "tda_lightning.cli", "info", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a recording of" in result.stdout
