"""What a training prints by default: one paragraph, through the package's own logger."""

import logging

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, attribute
from tda_lightning.callbacks.messages import inform
from tda_lightning.stores import MemoryStore


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "tda_lightning"]


def fit(store, **settings):
    recorder = GradientRecorder(store, **settings)
    quiet_trainer(recorder).fit(Plain(mlp()), loader(vectors()))


def test_a_training_logs_one_paragraph(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        fit("run.tda", snapshots=3)
    (message,) = messages(caplog)
    assert message == (
        "GradientRecorder: recording every step and 100.0% of the trained parameters into "
        "`run.tda`, about 0 MiB for 26 visits of samples. Snapshots of the weights take 0.0 MiB "
        "each; about 2 of them, 0.0 MiB. Limit its size with `max_gb` and its time with "
        "`max_overhead`."
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_steps": 2}, "recording one step in 2 and 100.0%"),
        ({"max_gb": 1.0}, " visits of samples. Limit its time with `max_overhead`."),
        ({"max_gb": 1.0, "max_overhead": 1e6}, "adds no more than 1e+08 % of time."),
    ],
    ids=["stride", "disk", "disk and time"],
)
def test_it_names_the_stride_and_the_limits_that_are_not_set(settings, expected, caplog):
    with caplog.at_level("INFO"):
        fit(MemoryStore(), **settings)
    (message,) = messages(caplog)
    assert expected in message
    assert "into a `MemoryStore`, " in message


def test_the_level_of_the_logger_silences_it(caplog):
    with caplog.at_level("WARNING", logger="tda_lightning"):
        fit(MemoryStore())
    assert not messages(caplog)


def test_messages_go_to_standard_error_unless_logging_is_set_up(capsys, monkeypatch):
    inform("seen by the handlers of the program")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    inform("seen by the fallback")
    assert capsys.readouterr().err == "seen by the fallback\n"


def test_without_gradients_a_query_names_inference_mode():
    recorder, model, queries = GradientRecorder(MemoryStore()), Plain(mlp()), vectors()[:3]
    quiet_trainer(recorder).fit(model, loader(vectors()))
    expected = attribute(recorder.store, model, queries, progress=False).values
    with torch.no_grad():
        scores = attribute(recorder.store, model, queries, progress=False)
    assert torch.equal(scores.values, expected)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside `torch.inference_mode"):
        attribute(recorder.store, model, queries, progress=False)
