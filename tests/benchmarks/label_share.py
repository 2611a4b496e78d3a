"""Sampled labels for a share of each batch, or for whole batches at a share of the steps?

    python tests/benchmarks/label_share.py
    python tests/benchmarks/label_share.py --tasks characters --share 0.1 --seeds 9

Both ways record as many rows. Both are unbiased. The second costs that share of a backward pass;
the first costs a whole one, for it must go back through the graph of the whole batch.

One run per task is recorded with labels for all samples of all steps. Rows are then left out, in
both ways and with several seeds, and the others scaled to make up for them. The truth is that of
`lds.py`: retraining of the same run without a tenth of the samples. The table has the mean over
queries of Spearman's correlation with it, and its standard deviation over seeds.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lds import judge
from lds_runs import Run, record
from lds_tasks import TASKS
from lds_truths import Retrainer, Truth, options_of
from torch import Generator, Tensor

from tda_lightning import InfluenceFunction, Source, Unrolled
from tda_lightning.gradients.losses import LabelSchedule
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import FIRST_LABELLED_STEPS, Step

METHODS = (Unrolled(), InfluenceFunction(), Source())
# The rows of a step, its number, and a seed, to the rows that are left.
Way = Callable[[Tensor, int, int], Tensor | None]


def share_of_batches(share: float) -> Way:
    """Return the rows of some samples of each batch, drawn at random."""

    def way(rows: Tensor, number: int, seed: int) -> Tensor:
        generator = Generator().manual_seed(10_000 * seed + number)
        chosen = torch.randperm(len(rows), generator=generator)[: max(1, round(share * len(rows)))]
        return rows[chosen] * (len(rows) / len(chosen)) ** 0.5

    return way


def share_of_steps(share: float) -> Way:
    """Return the rows of the recorder's schedule; each seed is another stretch of it."""
    schedule = LabelSchedule(share)

    def way(rows: Tensor, number: int, seed: int) -> Tensor:
        later = 10_000 * seed if number >= FIRST_LABELLED_STEPS else 0
        weight = schedule.weight(number + later)
        return rows * weight**0.5 if weight else rows[:0]

    return way


def ways(share: float) -> dict[str, Way]:
    return {
        "none": lambda rows, number, seed: None,
        "all": lambda rows, number, seed: rows,
        f"{share:g} of each batch": share_of_batches(share),
        f"{share:g} of the steps": share_of_steps(share),
    }


def thinned(run: Run, steps: Sequence[Step], way: Way, seed: int) -> Run:
    """Return the run with some of its rows of sampled labels."""
    store = MemoryStore()
    store.begin(run.store.recipe)
    for number, step in enumerate(steps):
        assert step.curvature_rows is not None
        store.append(replace(step, curvature_rows=way(step.curvature_rows, number, seed)))
    return replace(run, store=store)


def cells(run: Run, steps: Sequence[Step], way: Way, truth: Truth, seeds: int) -> list[str]:
    """Return the score of each method, with its standard deviation over seeds."""
    values = torch.zeros(seeds, len(METHODS))
    for seed in range(seeds):
        part = thinned(run, steps, way, seed)
        values[seed] = torch.tensor([judge(part.scores(m, "now"), truth)[0] for m in METHODS])
    spread = values.std(dim=0).tolist() if seeds > 1 else [0.0] * len(METHODS)
    pairs = zip(values.mean(dim=0).tolist(), spread, strict=True)
    return [f"{mean:.3f} ±{deviation:.3f}" for mean, deviation in pairs]


def print_task(name: str, options: argparse.Namespace) -> None:
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        run = record(task, Path(folder) / "run.tda", {"curvature": "fisher"}, seed=0)
        steps = list(run.store)
        retrainer = Retrainer(task, options.subsets, 1, options.cache)
        truth = retrainer.same_run(run.initial, run.batches)
        for way_name, way in ways(options.share).items():
            seeds = options.seeds if " of " in way_name else 1
            row = [name, way_name, *cells(run, steps, way, truth, seeds)]
            print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["digits-mlp", "digits-cnn", "characters", "breast-cancer"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=names, metavar="TASK")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=30, help="to retrain on")
    options = options_of(parser)
    names = [type(method).__name__ for method in METHODS]
    print(f"| task | labels | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for name in options.tasks:
        print_task(name, options)


if __name__ == "__main__":
    main()
