"""Do scores predict the effect of retraining? Linear datamodeling scores of all methods.

    python tests/benchmarks/lds.py
    python tests/benchmarks/lds.py --tasks digits-mlp --methods tracin knn --quick

Two truths, both from real retraining. *Same run*: a tenth of the samples is left out of the
recorded run, which starts from the same weights and draws the same batches. *Expected*: new
trainings on half of the samples, the mean over several initial weights and orders.

The table has, for each method: the mean over queries of Spearman's correlation, with its standard
error; the seconds that it took; the size of its store; and the best value of a grid. That value is
chosen by the truth that it is then compared with: a bar for others, not a result. Rows without a
value at defaults are bars only. Times are of one thread.

The first run retrains for about an hour and caches the results in the folder `--cache`.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from lds_methods import Entry, methods_of, recordings
from lds_runs import Run, record
from lds_tasks import TASKS, Task
from lds_truths import Retrainer, Truth
from torch import Tensor
from tqdm import tqdm

from tda_lightning.metrics import linear_datamodeling_score

HEADINGS = (f"{'method':31s}", f"{'same run':12s}", f"{'expected':12s}", "seconds", "  MiB")
HEADINGS += (f"{'best tuned, same run':40s}", f"{'best tuned, expected':40s}")
Judged = tuple[float, float]


def judge(scores: Tensor, truth: Truth) -> Judged:
    """Return the mean over queries of the score, and its standard error."""
    losses = truth.losses.mean(dim=0)
    correlations = linear_datamodeling_score(scores, truth.included, losses)
    # A method that predicts the same for every subset has predicted nothing.
    correlations = correlations.nan_to_num(0.0)
    return float(correlations.mean()), float(correlations.std() / len(correlations) ** 0.5)


def ceiling(truth: Truth) -> float:
    """Estimate the score of a perfect method, which predicts the mean over infinitely many seeds.

    The losses of one half of the seeds are correlated with those of the other half. The formula of
    Spearman and Brown turns that into the reliability of the mean over both halves.
    """
    first, second = (half.mean(dim=0) for half in truth.losses.tensor_split(2))
    each = torch.eye(len(truth.included), dtype=torch.bool)
    agreement = float(linear_datamodeling_score(-first.mT, each, second).mean())
    return (2 * agreement / (1 + agreement)) ** 0.5


def row_of(entry: Entry, truths: Sequence[Truth]) -> list[str]:
    """Compute one line of the table."""
    cells = [entry.name, "-", "-", "-"]
    candidates: list[tuple[str, list[Judged]]] = []
    if entry.compute is not None:
        start = time.perf_counter()
        scores = entry.compute()
        seconds = time.perf_counter() - start
        judged = [judge(scores, truth) for truth in truths]
        cells = [entry.name, *map(shown, judged), f"{seconds:.1f}"]
        candidates.append(("the defaults", judged))
    cells.append(f"{entry.mebibytes:.1f}" if entry.mebibytes is not None else "-")
    others = [(name, [judge(scores, truth) for truth in truths]) for name, scores in entry.grid()]
    for place in range(len(truths)):
        cells.append(best_of([*candidates, *others], place) if others else "-")
    return cells


def best_of(candidates: Iterable[tuple[str, list[Judged]]], place: int) -> str:
    name, judged = max(candidates, key=lambda candidate: candidate[1][place][0])
    return f"{shown(judged[place])}: {name}"


def shown(judged: Judged) -> str:
    return f"{judged[0]:.3f} ±{judged[1]:.3f}"


def print_task(task: Task, options: argparse.Namespace) -> None:
    """Record, retrain and print the table of one task."""
    retrainer = retrainer_of(task, options)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: record(task, Path(folder) / f"run {number}.tda", settings, options.seed)
            for number, (name, settings) in enumerate(recordings(options.dimension).items())
        }
        main = runs[""]
        main.require_replayable()
        truths = (retrainer.same_run(main.initial, main.batches), retrainer.expected())
        print(f"\n{describe(main)}\nCeiling of expected: about {ceiling(truths[1]):.2f}.\n")
        print_row(HEADINGS)
        print_row(["-" * len(heading) for heading in HEADINGS])
        for entry in tqdm(methods_of(runs, retrainer), desc="methods", leave=False):
            if is_wanted(entry, options.methods):
                print_row(row_of(entry, truths))


def describe(run: Run) -> str:
    task = run.task
    parameters = sum(value.numel() for value in run.final.values())
    return (
        f"{task.title}: {parameters:,} parameters, {len(task.data().train):,} samples, "
        f"{len(run.store):,} steps, {run.seconds:.1f} s with recording, "
        f"k = {run.store.recipe.dimension:,}."
    )


def retrainer_of(task: Task, options: argparse.Namespace) -> Retrainer:
    subsets, seeds = (30, 2) if options.quick else (100, 5)
    return Retrainer(task, subsets, seeds, options.cache)


def is_wanted(entry: Entry, wanted: Sequence[str]) -> bool:
    return not wanted or any(word.lower() in entry.name.lower() for word in wanted)


def print_row(cells: Sequence[str]) -> None:
    padded = (cell.ljust(len(heading)) for cell, heading in zip(cells, HEADINGS, strict=True))
    tqdm.write(f"| {' | '.join(padded)} |")


def print_estimate(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    seconds = sum(retrainer_of(task, options).estimated_seconds() for task in tasks)
    print(f"Retraining takes about {seconds / 60:.0f} minutes, unless {options.cache} has it.")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", default=[], help="words in their names")
    parser.add_argument("--quick", action="store_true", help="fewer subsets and seeds")
    parser.add_argument("--dimension", type=int, default=4096, help="of the wider recording")
    parser.add_argument("--seed", type=int, default=0, help="of the recorded run")
    parser.add_argument("--threads", type=int, default=1)
    default = Path(tempfile.gettempdir()) / "tda-lightning-lds"
    parser.add_argument("--cache", type=Path, default=default, help="folder of retraining results")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning warns that batches and epochs are small.
    tasks = [TASKS[name] for name in options.tasks]
    print_estimate(tasks, options)
    for task in tasks:
        print_task(task, options)


if __name__ == "__main__":
    main()
