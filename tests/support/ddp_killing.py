"""Kill two processes of a DDP training at random and check the recorded run; run as a script.

The processes are forks of this one, so that torch is not imported a hundred times. They are started
as ``torchrun`` starts its workers. As there, if one has died, the other is ended, too.
"""

import functools
import itertools
import logging
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import lean_lightning  # noqa: F401, before Lightning
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, Plain, mlp, quiet_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Sampler

from tda_lightning import GradientRecorder, HDF5Store, Identity
from tda_lightning.stores.contract import same

KILLS = 30
RANKS = 2
SAMPLES, BATCH = 48, 3
CHECKPOINT_STEPS = 7
# Longer than any training here takes; the upper limit of every wait.
MAX_SECONDS = 300.0


@functools.cache
def ids_of_step(index):
    """Return the sample ids of a step, in the order of the processes."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(index))
    return order[: RANKS * BATCH].tolist()


class Stream(Sampler):
    """The part of one process of an endless epoch that can begin at any step."""

    def __init__(self, rank):
        self.part, self.begin = slice(rank * BATCH, (rank + 1) * BATCH), 0

    def __iter__(self):
        for index in itertools.count(self.begin):
            yield from ids_of_step(index)[self.part]


class ResumeStream(pl.Callback):
    """Make a stream continue at the step at which the checkpoint was saved."""

    def __init__(self, stream):
        self.stream = stream

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.stream.begin = checkpoint["global_step"]


class SlowStore(HDF5Store):
    """A store that seals slowly, so that a kill may come before all processes have sealed."""

    def seal(self):
        time.sleep(random.uniform(0.0, 0.03))
        super().seal()


class FailsOnSignal(Plain):
    """A module that fails in the next step once ``is_to_fail`` is set."""

    is_to_fail = False

    def training_step(self, batch, batch_idx):
        if FailsOnSignal.is_to_fail:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


class SignalSteps(pl.Callback):
    """Write a byte to a pipe after each step of the first process."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            os.write(self.pipe, b"!")


def train(folder, rank, pipe, max_steps):
    def fail(*_):
        FailsOnSignal.is_to_fail = True

    random.seed(os.getpid())
    signal.signal(signal.SIGUSR1, fail)
    store = SlowStore(folder / "run", storage="as computed", segment_bytes=20_000)
    saver = ModelCheckpoint(
        folder, save_last=True, save_top_k=0, every_n_train_steps=CHECKPOINT_STEPS
    )
    recorder = GradientRecorder(store, projector=Identity(), existing="replace", snapshots=10)
    stream = Stream(rank)
    trainer = quiet_trainer(
        *(recorder, saver, ResumeStream(stream), SignalSteps(pipe)),
        devices=RANKS,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=-1,
        max_steps=max_steps,
        enable_checkpointing=True,
    )
    model = FailsOnSignal(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    data = DataLoader(IndexedVectors(SAMPLES), batch_size=BATCH, sampler=stream)
    last = folder / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)


def work(folder, rank, pipe, max_steps):
    """Train in a forked process and exit; write a traceback to ``rank-<rank>.txt`` on failure."""
    code = 1
    try:
        train(folder, rank, pipe, max_steps)
        code = 0
    except BaseException:
        (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def tracebacks(folder):
    return [file.read_text() for file in folder.glob("rank-?.txt")]


def start(folder, max_steps=-1):
    """Fork the processes; return them and a pipe that receives a byte per step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    read_end, write_end = os.pipe()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank))
            work(folder, rank, write_end, max_steps)
        children.append(child)
    os.close(write_end)
    return children, read_end


def wait(children, seconds):
    """Return the children alive after some time, and whether all others exited with status 0."""
    deadline, all_succeeded = time.monotonic() + seconds, True
    alive = list(children)
    while alive and time.monotonic() < deadline:
        for child in list(alive):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                alive.remove(child)
                all_succeeded = all_succeeded and status == 0
        time.sleep(0.005)
    return alive, all_succeeded


def finish(folder, max_steps):
    """Train to the end without a kill."""
    children, read_end = start(folder, max_steps)
    alive, all_succeeded = wait(children, MAX_SECONDS)
    for child in alive:
        os.kill(child, signal.SIGKILL)
    os.close(read_end)
    assert not alive, tracebacks(folder)
    assert all_succeeded, tracebacks(folder)


def kill(folder, rng, is_early):
    """Start or resume a training, and kill it; return the signal and the victims."""
    children, read_end = start(folder)
    # Steps, not seconds: a busy machine takes none in a second.
    for _ in range(0 if is_early else rng.randint(1, 2 * CHECKPOINT_STEPS)):
        assert os.read(read_end, 1), tracebacks(folder)
    time.sleep(rng.uniform(0.0, 1.0 if is_early else 0.05))
    chosen_signal = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    victims = rng.choice([[0], [1], [0, 1]])
    for rank in victims:
        os.kill(children[rank], chosen_signal)
    alive = children
    for seconds, stronger in ((1.5, signal.SIGTERM), (1.0, signal.SIGKILL), (MAX_SECONDS, None)):
        alive, _ = wait(alive, seconds)
        for child in alive if stronger else ():
            os.kill(child, stronger)
    os.close(read_end)
    assert not alive
    return chosen_signal.name, victims


def saved_steps(folder):
    last = folder / "last.ckpt"
    return torch.load(last, weights_only=False)["global_step"] if last.exists() else 0


def check(folder):
    """Assert that the run has no missing or incomplete step; return its length."""
    # A kill before the first checkpoint may also come before the run is created.
    if not (folder / "run" / "recipe.json").exists():
        assert not saved_steps(folder)
        return 0
    store = HDF5Store.open(folder / "run")
    for position, step in enumerate(store):
        assert step.index == position
        assert step.sample_ids.tolist() == ids_of_step(position), position
        assert step.sketch.shape == (RANKS * BATCH, store.recipe.dimension)
        least, most = step.sketch.abs().amax(dim=1).aminmax()
        assert 0.0 < least <= most < float("inf")
    saved = saved_steps(folder)
    assert len(store) >= saved, (len(store), saved)
    snapshots = store.snapshots()
    assert snapshots[: saved // 10] == list(range(0, saved - saved % 10, 10))
    assert all(store.weights_at(index) for index in snapshots[-2:])
    return len(store)


def main(folder):
    rng, lengths, kills = random.Random(0), [], []
    for number in range(KILLS):
        kills.append(kill(folder / "parts", rng, is_early=number % 5 == 0))
        lengths.append(check(folder / "parts"))
    print(list(zip(lengths, kills, strict=True)), flush=True)
    total = saved_steps(folder / "parts") + 20
    for name in ("parts", "whole"):
        finish(folder / name, total)
        assert check(folder / name) == total
    parts, whole = (HDF5Store.open(folder / name / "run") for name in ("parts", "whole"))
    # Bit for bit: torch's memory begins at multiples of 64 bytes, and among these the place of
    # an operand does not matter to a product of matrices.
    assert all(itertools.starmap(same, zip(parts, whole, strict=True)))
    assert parts.snapshots() == whole.snapshots()
    assert len(set(lengths)) > KILLS // 2, lengths


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for name in ("parts", "whole"):
        (Path(sys.argv[1]) / name).mkdir()
    main(Path(sys.argv[1]))
