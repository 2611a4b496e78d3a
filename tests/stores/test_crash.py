"""Kill real trainings at random moments: the store still opens, and every step is complete."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, HDF5Store, Identity

# Each line of input starts a training. It is forked, so that torch is imported only once.
TRAININGS = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import lean_lightning  # before Lightning
import pytorch_lightning as pl
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from tda_lightning import GradientRecorder, HDF5Store, Identity
torch.set_num_threads(1)

class PrintSteps(pl.Callback):
    def on_train_batch_end(self, *_):
        os.write(1, b"step\\n")

def train():
    store = HDF5Store(sys.argv[1], segment_bytes=20_000)
    recorder = GradientRecorder(store, projector=Identity(), existing="replace")
    trainer = quiet_trainer(recorder, PrintSteps(), max_epochs=100_000)
    trainer.fit(Plain(mlp()), loader(vectors()))

while sys.stdin.readline():
    child = os.fork()
    if child == 0:
        try:
            train()
        finally:
            os._exit(1)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.fixture
def trainings(tmp_path, request):
    """Return a process that trains whenever it reads a line; it prints the training's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAININGS, str(tmp_path / "run")],
        cwd=request.path.parents[1] / "support",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process


def kill_after(steps, seconds, trainings):
    """Start a training and kill it so many seconds after a step."""
    print(file=trainings.stdin, flush=True)
    number = int(trainings.stdout.readline())
    for _ in range(steps):
        assert trainings.stdout.readline() == "step\n"
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    lines = iter(trainings.stdout.readline, "ended\n")
    assert set(lines) <= {"step\n"}


@pytest.mark.slow
def test_after_twenty_random_kills_every_step_is_complete(tmp_path, trainings):
    moments = random.Random(0)
    lengths = set()
    for _ in range(20):
        kill_after(moments.randrange(120), moments.uniform(0, 0.1), trainings)
        # A kill may come after the former run was removed, and before the next one has begun.
        has_begun = (tmp_path / "run" / "recipe.json").exists()
        store = HDF5Store.open(tmp_path / "run") if has_begun else []
        lengths.add(len(store))
        for position, step in enumerate(store):
            n = len(step.sample_ids)
            assert step.index == position
            assert step.sketch.shape == (n, store.recipe.dimension)
            least, most = step.sketch.abs().amax(dim=1).aminmax()
            assert 0.0 < least <= most < float("inf")
            torch.testing.assert_close(step.weights, torch.full((n,), 1 / n))
    assert len(lengths) > 5, "the kills came at the same moment every time"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_training_loses_no_step(tmp_path, error):
    class Interrupted(Plain):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                raise error
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(GradientRecorder(tmp_path / "run", projector=Identity()))
    with pytest.raises((error, SystemExit)):
        trainer.fit(Interrupted(mlp()), loader(vectors()))
    assert len(HDF5Store.open(tmp_path / "run")) == 4


def test_steps_are_sealed_before_a_checkpoint_that_refers_to_them(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    counts = []

    class CountsSteps(ModelCheckpoint):
        def _save_checkpoint(self, trainer, path):
            super()._save_checkpoint(trainer, path)
            counts.append((trainer.global_step, len(HDF5Store.open(tmp_path / "run"))))

    saver = CountsSteps(tmp_path, every_n_train_steps=2, save_top_k=-1)
    recorder = GradientRecorder(tmp_path / "run")
    trainer = quiet_trainer(saver, recorder, enable_checkpointing=True)
    trainer.fit(Plain(mlp()), loader(vectors()))
    assert [global_step for global_step, _ in counts] == [2, 4, 6]
    assert all(global_step == sealed for global_step, sealed in counts)


# Fork the children from a process that has imported torch, so that it is imported only once.
KILLED_TRAININGS = """
import os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
import logging
logging.disable(logging.CRITICAL)
import torch
torch.set_num_threads(1)
import lean_lightning  # before Lightning
from pathlib import Path
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from tda_lightning import GradientRecorder, HDF5Store, Identity
import pytorch_lightning as pl

folder = Path(sys.argv[1])
run, last = folder / "run", folder / "last.ckpt"

def fail(*_):
    raise RuntimeError("on purpose")

class ReportSteps(pl.Callback):
    def on_train_batch_end(self, *_):
        os.write(write_end, b"!")

def train():
    signal.signal(signal.SIGUSR1, fail)
    store = HDF5Store(run, segment_bytes=20_000)
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=7)
    recorder = GradientRecorder(store, projector=Identity(), existing="replace")
    callbacks = (recorder, saver, ReportSteps())
    trainer = quiet_trainer(*callbacks, max_epochs=100_000, enable_checkpointing=True)
    trainer.fit(Plain(mlp()), loader(vectors()), ckpt_path=last if last.exists() else None)

def check():
    # A kill may come before the run has begun.
    store = HDF5Store.open(run) if (run / "recipe.json").exists() else []
    for position, step in enumerate(store):
        assert step.index == position, [step.index for step in store]
        rows = step.sketch
        assert rows.shape == (len(step.sample_ids), store.recipe.dimension), rows.shape
        least, most = rows.abs().amax(dim=1).aminmax()
        assert 0.0 < least <= most < float("inf"), (step.index, len(store), rows)
    if last.exists():
        saved = torch.load(last, weights_only=False)["global_step"]
        assert len(store) >= saved, (len(store), saved)
    return len(store)

moments, lengths = random.Random(0), []
for number in range(30):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train()
        finally:
            os._exit(1)
    # Kill most children during training, and some while the run is still being opened. Steps are
    # counted, not seconds: a busy machine takes none in a second.
    for _ in range(moments.randint(1, 25) if number % 5 else 0):
        os.read(read_end, 1)
    time.sleep(moments.uniform(0.0, 0.05 if number % 5 else 0.5))
    os.close(read_end), os.close(write_end)
    sent_signal = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1][number % 3]
    os.kill(child, sent_signal)
    # Python ignores an exception raised during garbage collection; training then continues.
    deadline = time.monotonic() + 2
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    lengths.append(check())
print(lengths)
assert lengths[-1] > lengths[0] and len(set(lengths)) > 15, lengths
"""


@pytest.mark.slow
def test_trainings_resume_after_thirty_kills_in_three_ways(tmp_path, request):
    command = [sys.executable, "-c", KILLED_TRAININGS, str(tmp_path)]
    result = subprocess.run(
        command, cwd=request.path.parents[1] / "support", capture_output=True, timeout=1500
    )
    assert result.returncode == 0, result.stderr[-2000:].decode()
