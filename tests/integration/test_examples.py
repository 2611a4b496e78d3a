"""The examples run on real data and give the documented results."""

import re
import runpy
from pathlib import Path

import pytest

from tda_lightning import HDF5Store

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_digits_example_finds_the_flipped_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["digits.py"])
    runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
    output = capsys.readouterr().out
    percentage = float(re.search(r"self-influence stand ([\d.]+)%", output).group(1))
    assert percentage >= 85
    assert re.search(r"highest loss after training\s+[\d.]+%", output)
    assert output.count("proponents") == output.count("opponents ") == 3
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert len(HDF5Store.open(tmp_path / "digits.tda")) == 450
