"""How much of a displacement may a step with momentum remove? `Unrolled` with several limits.

    python tests/benchmarks/momentum_limits.py
    python tests/benchmarks/momentum_limits.py --tasks --facts 0 1

With momentum mu, each limit is a power of 1 / (1 - mu): `Unrolled` judges overshoot by the learning
rate of plain gradient descent, times that power, over 1 / (1 - mu). The power 1 is the default.
Printed are the linear datamodeling scores of the tasks with momentum, same run and expected, and
the mean reciprocal ranks of planted facts: the same words and paraphrased, by `Unrolled` and by
`Averaged`. The first run retrains for about half an hour and caches the results.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from lds import judge
from lds_runs import record
from lds_tasks import TASKS
from lds_truths import Retrainer, options_of
from torch.utils.data import DataLoader
from uses_data import batches_of, fit
from uses_data_text import LanguageModel, corpus
from uses_facts import BATCH_SIZE, reciprocal_rank

from tda_lightning import Unrolled, attribute
from tda_lightning.attribution import Attributor, Averaged
from tda_lightning.attribution.dynamics.optimizer import Dynamics

POWERS = (0.5, 1.0, 1.5, 2.0)
METHODS: tuple[Attributor, ...] = (Unrolled(), Averaged())
WITH_MOMENTUM = (
    "digits-cnn",
    "characters",
    "breast-cancer",
    "diabetes",
    "autoencoder",
    "batch-norm-adamw",
)


@contextmanager
def limited_by(power: float) -> Iterator[None]:
    """Judge overshoot by another power of 1 / (1 - mu)."""
    rate = property(lambda step: step.lr * step.gradient_share / (1 - step.momentum) ** power)
    with patch.object(Dynamics, "effective_lr", rate):
        yield


def print_task(name: str, cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = record(TASKS[name], Path(folder) / "run.tda", {}, 0)
        retrainer = Retrainer(TASKS[name], 40, 2, cache)
        truths = (retrainer.same_run(run.initial, run.batches), retrainer.expected())
        for power in POWERS:
            with limited_by(power):
                scores = run.scores(Unrolled(), "now")
            judged = " / ".join(f"{judge(scores, truth)[0]:.3f}" for truth in truths)
            print(f"| {name} | {power} | {judged} |", flush=True)


def print_facts(seed: int, epochs: int) -> None:
    texts = corpus(seed)
    torch.manual_seed(seed)
    model = LanguageModel(len(texts.vocabulary))
    batches = batches_of(len(texts.passages), epochs, seed, BATCH_SIZE)
    run = fit(model, texts.train, batches)
    for power in POWERS:
        with limited_by(power):
            for kind, queries in texts.queries.items():
                loader = DataLoader(queries, 1)
                ranks = [
                    reciprocal_rank(
                        attribute(run, model, loader, method=method, progress=False), texts.answers
                    )
                    for method in METHODS
                ]
                shown = " / ".join(f"{rank:.3f}" for rank in ranks)
                print(f"| facts {seed}, {epochs} epochs, {kind} | {power} | {shown} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=WITH_MOMENTUM, default=WITH_MOMENTUM)
    parser.add_argument("--facts", nargs="*", type=int, default=[0, 1], help="seeds", metavar="S")
    options = options_of(parser)
    print("| task | power | same run / expected, or Unrolled / Averaged |\n|---|---|---|")
    for name in options.tasks:
        print_task(name, options.cache)
    for seed in options.facts:
        for epochs in (6, 25):
            print_facts(seed, epochs)


if __name__ == "__main__":
    main()
