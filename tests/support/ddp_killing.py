"""Two processes that train together are killed at random; run as a script, since they are forks.

Forks of a warm process need not import torch a hundred times. They are started as ``torchrun``
starts its workers, and as there, when one has died, the other one is not left waiting.
"""

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

import pytorch_lightning as pl
import torch
from lightning_models import Plain, Telling, mlp, quiet_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Sampler

from tda_lightning import GradientRecorder, HDF5Store, Identity
from tda_lightning.stores.contract import same

KILLS = 50
RANKS = 2
SAMPLES, BATCH = 48, 3
# More than a training takes that nobody kills; nothing here waits longer.
PATIENCE = 60.0


def ids_of_step(index):
    """Return the samples of a step, in the order of the processes."""
    drawn = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(index))
    return drawn[: RANKS * BATCH].tolist()


class Stream(Sampler):
    """What one process sees of an endless epoch that can be begun at any step."""

    def __init__(self, rank):
        self.part, self.begin = slice(rank * BATCH, (rank + 1) * BATCH), 0

    def __iter__(self):
        for index in itertools.count(self.begin):
            yield from ids_of_step(index)[self.part]


class Skips(pl.Callback):
    """Lets a stream go on where the checkpoint was saved."""

    def __init__(self, stream):
        self.stream = stream

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.stream.begin = checkpoint["global_step"]


class Sluggish(HDF5Store):
    """Takes its time to seal, so that a kill may come before all processes have."""

    def seal(self):
        time.sleep(random.uniform(0.0, 0.03))
        super().seal()


class Fragile(Plain):
    """Fails in the step after it was told to."""

    is_to_fail = False

    def training_step(self, batch, batch_idx):
        if Fragile.is_to_fail:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


class Tells(pl.Callback):
    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_start(self, trainer, module):
        os.write(self.pipe, b"!")


def train(folder, rank, pipe, max_steps):
    def fail(*_):
        Fragile.is_to_fail = True

    random.seed(os.getpid())
    signal.signal(signal.SIGUSR1, fail)
    store = Sluggish(folder / "run", storage="as computed", segment_bytes=20_000)
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=7)
    recorder = GradientRecorder(store, projector=Identity(), existing="replace", snapshots=10)
    stream = Stream(rank)
    trainer = quiet_trainer(
        *(recorder, saver, Skips(stream), Tells(pipe)),
        devices=RANKS,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=-1,
        max_steps=max_steps,
        enable_checkpointing=True,
    )
    model = Fragile(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    data = DataLoader(Telling(SAMPLES), batch_size=BATCH, sampler=stream)
    last = folder / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)


def work(folder, rank, pipe, max_steps):
    """Train in a forked process, and end it; what it said last stays behind."""
    code = 1
    try:
        train(folder, rank, pipe, max_steps)
        code = 0
    except BaseException:
        (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def last_words(folder):
    return [file.read_text() for file in folder.glob("rank-?.txt")]


def start(folder, max_steps=-1):
    """Fork the processes; return them, and a pipe on which they tell that they take steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hearing, telling = os.pipe()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank))
            work(folder, rank, telling, max_steps)
        children.append(child)
    os.close(telling)
    return children, hearing


def wait(children, seconds):
    """Return those that still live after some time, and whether all that ended ended well."""
    deadline, is_well = time.monotonic() + seconds, True
    alive = list(children)
    while alive and time.monotonic() < deadline:
        for child in list(alive):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                alive.remove(child)
                is_well = is_well and status == 0
        time.sleep(0.005)
    return alive, is_well


def finish(folder, max_steps):
    """Train to the end, undisturbed."""
    children, hearing = start(folder, max_steps)
    alive, is_well = wait(children, PATIENCE)
    for child in alive:
        os.kill(child, signal.SIGKILL)
    os.close(hearing)
    assert not alive, last_words(folder)
    assert is_well, last_words(folder)


def kill(folder, dice, is_early):
    """Begin or resume a training, and end it; return how."""
    children, hearing = start(folder)
    if not is_early:
        assert os.read(hearing, 1), last_words(folder)
    time.sleep(dice.uniform(0.0, 1.0 if is_early else 0.5))
    way = dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    victims = dice.choice([[0], [1], [0, 1]])
    for rank in victims:
        os.kill(children[rank], way)
    alive = children
    for seconds, more in ((1.5, signal.SIGTERM), (1.0, signal.SIGKILL), (PATIENCE, None)):
        alive, _ = wait(alive, seconds)
        for child in alive if more else ():
            os.kill(child, more)
    os.close(hearing)
    assert not alive
    return way.name, victims


def saved_steps(folder):
    last = folder / "last.ckpt"
    return torch.load(last, weights_only=False)["global_step"] if last.exists() else 0


def check(folder):
    """Require a run without holes in which every step is whole; return its length."""
    # A kill before the first checkpoint may come before the run, too.
    if not (folder / "run" / "recipe.json").exists():
        assert not saved_steps(folder)
        return 0
    store = HDF5Store.open(folder / "run")
    for place, step in enumerate(store):
        assert step.index == place
        assert step.sample_ids.tolist() == ids_of_step(place), place
        assert step.sketch.shape == (RANKS * BATCH, store.recipe.dimension)
        assert torch.isfinite(step.sketch).all()
        assert (step.sketch != 0).any(dim=1).all()
    saved = saved_steps(folder)
    assert len(store) >= saved, (len(store), saved)
    snapshots = store.snapshots()
    assert snapshots[: saved // 10] == list(range(0, saved - saved % 10, 10))
    assert all(store.weights_at(one) for one in snapshots[-2:])
    return len(store)


def main(folder):
    dice, lengths, ways = random.Random(0), [], []
    for number in range(KILLS):
        ways.append(kill(folder / "parts", dice, is_early=number % 5 == 0))
        lengths.append(check(folder / "parts"))
    print(list(zip(lengths, ways, strict=True)), flush=True)
    total = saved_steps(folder / "parts") + 20
    for name in ("parts", "whole"):
        finish(folder / name, total)
        assert check(folder / name) == total
    parts, whole = (HDF5Store.open(folder / name / "run") for name in ("parts", "whole"))
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
