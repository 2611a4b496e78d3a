"""The commands that inspect a run: text, JSON, exit codes, and one line per error."""

import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import version

import pytest
from click.testing import CliRunner
from hostile_strings import HOSTILE
from lightning_models import Plain, loader, quiet_trainer, vectors
from torch import nn

import tda_lightning
from tda_lightning import GradientRecorder
from tda_lightning.cli import main
from tda_lightning.cli.main import commands
from tda_lightning.cli.output import Answer, aligned, folded, show
from tda_lightning.stores.integrity.damage import printable


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


def run_json(*words):
    result = CliRunner().invoke(commands, [*map(str, words), "--json"])
    return json.loads(result.output), result.exit_code


def test_json_holds_what_the_text_shows(run):
    facts, code = run_json("info", run)
    assert code == 0
    assert (facts["model"], facts["steps"], facts["every_n_steps"]) == ("Plain", 3, 2)
    assert (facts["samples"], facts["epochs"]) == (13, [0, 1])
    assert [layer["name"] for layer in facts["layers"]] == [
        "net.head.weight",
        "net.head.bias",
        "net.gate",
    ]
    assert facts["layers"][0]["left_out"] is None
    assert "not among" in facts["layers"][2]["left_out"]
    assert sum(layer["share"] for layer in facts["layers"]) == pytest.approx(1)


def test_audit_fails_if_less_is_explained_than_wanted(run, capsys):
    share = run_json("audit", run)[0]["gradient"]["mean"]
    assert 0 < share < 1
    margin = min(share, 1 - share) / 2
    assert main(["audit", str(run), "--least", str(share - margin)]) == 0
    assert main(["audit", str(run), "--least", str(share + margin)]) == 1
    assert "steps audited" in capsys.readouterr().out


def test_data_fails_on_request_if_samples_are_missing(run, capsys):
    # A stride of 2 leaves out half of the steps, and so some of the samples.
    never = run_json("data", run)[0]["never"]
    assert never
    assert main(["data", str(run)]) == 0
    assert main(["data", str(run), "--check"]) == 1
    assert "never seen" in capsys.readouterr().out


def test_verify_names_the_damaged_file_and_exits_with_1(run):
    assert run_json("verify", run)[0]["bad"] == 0
    segment = next(run.glob("segment-*"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 255
    segment.write_bytes(content)
    report, _ = run_json("verify", run)
    bad = [file["name"] for file in report["files"] if file["state"] == "damaged"]
    assert bad == [segment.name]
    assert main(["verify", str(run)]) == 1


@pytest.mark.parametrize("words", [["nothing"], ["info"], ["info", "a", "b"], ["info", "--x", "a"]])
def test_a_wrong_command_line_exits_with_2(words, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: tda-lightning" in captured.err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["info", "--help"], ["export", "-h"]])
def test_help_and_version_exit_with_0(words, capsys):
    assert main(words) == 0
    assert "tda-lightning" in capsys.readouterr().out


def test_terminal_escapes_in_names_are_shown_and_not_obeyed(capsys):
    hostile = ["\x1b[2J", "a\nb", "\r", "\u202eevil", "\x00", "\u2066", "\x9b31m", "\ud800"]
    for name in hostile:
        show(Answer([f"run of {name}", *aligned([(name, "Linear")])], {"name": name}), False)
        show(Answer([], {"name": name}), True)
    output = capsys.readouterr().out
    assert output.isascii()
    assert all(character.isprintable() or character == "\n" for character in output)
    assert "\\x1b[2J" in output


def test_a_run_path_with_terminal_escapes_is_escaped_in_errors(tmp_path, capsys):
    assert main(["info", str(tmp_path / "\x1b[31mnowhere")]) == 1
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\\x1b[31mnowhere" in error


@pytest.mark.parametrize("command", ["info", "audit", "data", "verify", "self-influence"])
def test_hostile_run_paths_are_shown_in_one_line_and_never_obeyed(tmp_path, capsys, command):
    for text in HOSTILE:
        if "\0" in text or any(0xD800 <= ord(c) < 0xE000 for c in text):
            continue  # No file system takes these.
        assert main([command, str(tmp_path / "none" / text)]) == 1
        output, error = capsys.readouterr()
        assert output == ""
        assert error.count("\n") == 1
        assert error.rstrip("\n").isprintable()


def test_hostile_names_in_tables_are_shown_and_never_obeyed(capsys):
    for text in HOSTILE:
        rows = aligned([("name", "type"), (text, "Linear"), ("short", text)])
        show(Answer([f"run: {text}", *rows], {}), as_json=False)
        lines = capsys.readouterr().out.split("\n")
        assert len(lines) == 5
        assert all(line.isprintable() for line in lines)
        assert printable(text) in lines[2].replace("  Linear", "")
        show(Answer([], {"name": text}), as_json=True)
        output = capsys.readouterr().out
        assert output.isascii()
        assert json.loads(output)["name"] == text


def test_a_wide_line_is_folded_below_its_second_column():
    line = "    proponents  " + ", ".join(f"{i} (+0.1)" for i in range(30))
    lines = folded(line, 60).split("\n")
    assert all(len(part) <= 60 for part in lines)
    assert all(part.startswith(" " * 16) and part[16] != " " for part in lines[1:])
    assert " ".join(part.strip() for part in lines) == line.strip()
    note = folded("  note: " + "word " * 40, 60).split("\n")
    assert all(len(part) <= 60 and part.startswith(" " * 8) for part in note[1:])


def test_ordinary_text_stays_as_it_is():
    assert printable("résumé 学習 😀 net.head") == "résumé 学習 😀 net.head"


def test_long_names_are_cut():
    (line,) = aligned([("x" * 1_000_000, "y")])
    assert len(line) < 400


def test_interrupts_exit_with_130(monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("tda_lightning.cli.inspection.HDF5Store.open", interrupt)
    assert main(["info", "run.tda"]) == 130


@pytest.fixture
def run_module(monkeypatch, capfd):
    """Return a function that runs a module as `python -m` does, but without a new process."""

    def run_here(name, *words):
        monkeypatch.setattr(sys, "argv", ["__main__.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__")
        return end.value.code, *capfd.readouterr()

    return run_here


def test_a_process_prints_and_exits(run):
    command = [sys.executable, "-m", "tda_lightning", "info", str(run)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "a recording of" in result.stdout


@pytest.mark.slow
def test_a_reader_that_is_gone_ends_the_process_without_a_word(run):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tda_lightning", "info", str(run)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_an_error_ends_the_process_with_a_line(tmp_path, run_module):
    code, output, errors = run_module("tda_lightning", "info", tmp_path / "nowhere")
    assert (code, output) == (1, "")
    assert "nowhere" in errors
    assert "Traceback" not in errors


def test_shells_can_complete_commands(run_module, monkeypatch):
    monkeypatch.setenv("_TDA_LIGHTNING_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "tda-lightning ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    _, output, _ = run_module("tda_lightning")
    assert output.split() == ["plain,verify"]


def test_the_package_runs_as_a_module(run_module):
    code, output, _ = run_module("tda_lightning", "--help")
    assert code == 0
    assert "verify" in output
    assert tda_lightning.__version__ == version("tda_lightning")
