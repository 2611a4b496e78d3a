"""Runs that cannot be read, and packages that are missing: one line, exit code 1, no traceback."""

import json
import shutil
import sys

import pytest
from lightning_models import Plain, loader, quiet_trainer, vectors
from torch import nn

from tda_lightning import GradientRecorder
from tda_lightning.cli.main import commands, main

# Words after the run; files are written into the working directory.
COMMANDS = {
    "info": [],
    "audit": [],
    "data": [],
    "verify": [],
    "self-influence": [],
    "mislabeled": [],
    "export": ["--out", "table.csv"],
}
DAMAGES = ["absent", "empty", "another version", "damaged recipe", "without a segment"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    quiet_trainer(GradientRecorder(path)).fit(Plain(nn.Linear(7, 3)), loader(vectors()))
    return path


@pytest.fixture(params=DAMAGES)
def wrong(request, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run"
    if request.param == "empty":
        path.mkdir()
    if request.param in ("absent", "empty"):
        return path
    shutil.copytree(whole, path)
    recipe = path / "recipe.json"
    if request.param == "another version":
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"version": 99}))
    elif request.param == "damaged recipe":
        recipe.write_text(recipe.read_text()[:40])
    else:
        next(path.glob("*.h5")).unlink()
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_cannot_be_read_is_named_in_one_line(wrong, capsys, command):
    assert main([command, str(wrong), *COMMANDS[command]]) == 1
    output, error = capsys.readouterr()
    if command == "verify" and "missing" in output:
        return  # It lists every file.
    assert output == ""
    assert error.startswith("tda-lightning: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert str(wrong) in error


def test_a_missing_package_is_named_with_its_extra(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["export", str(whole), "--out", str(tmp_path / "table.parquet")]) == 1
    error = capsys.readouterr().err
    assert "tda_lightning[parquet]" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "self-influence"])
def test_a_folder_to_write_to_must_exist(whole, tmp_path, capsys, command):
    out = tmp_path / "absent" / "table.csv"
    assert main([command, str(whole), "--out", str(out)]) == 2
    assert "there is no folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", commands.commands)
def test_every_command_can_print_json(name):
    options = {word for option in commands.commands[name].params for word in option.opts}
    assert "--json" in options


def test_k_limits_the_ranking(whole, capsys):
    assert main(["self-influence", str(whole), "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 3 + 1
    assert lines[-1].endswith("and 10 more: see `-k`")


def test_more_flags_than_samples_are_refused(whole, capsys):
    assert main(["mislabeled", str(whole), "--number", "14"]) == 2
    assert "13" in capsys.readouterr().err
