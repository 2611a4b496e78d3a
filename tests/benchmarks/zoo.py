"""Which models can be recorded, how exactly, and what does recording them cost?

    python tests/benchmarks/zoo.py
    python tests/benchmarks/zoo.py --models mixtral t5 --rounds 0

One line per model of the zoo (`tests/support/zoo_models.py`), as a table in Markdown:

- the share of the trained parameters that is recorded, and what is left out, with the reason;
- the largest relative error of a row, against each sample's own gradient, in both precisions;
- whether a resumed training answers at the defaults, and with sampled labels for a quarter;
- the median time of a training step with the recorder, as a multiple of a step without it. Plain
  and recording runs take turns. At these sizes it is launches that cost, not arithmetic: the
  multiple says how the recorder would do on a GPU, not what it costs on a CPU;
- the seconds that the whole line took.

A model that is refused shows the beginning of the message.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1] / "support"))
from lightning_models import quiet_trainer
from zoo_cases import Case, quiet
from zoo_models import ZOO
from zoo_rows import compare
from zoo_training import ask, train_and_resume

from tda_lightning import GradientRecorder

HEADINGS = ("model", "recorded", "error, float32", "error, float64", "answers")
HEADINGS += ("with sampled labels", "step, x plain", "left out or refused", "seconds")
WARM_UP, STEPS, BATCH_SIZE = 22, 40, 5


class Clock(pl.Callback):
    """Keeps the time at which each step starts."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *arguments: object) -> None:
        self.starts.append(time.perf_counter())

    def step_seconds(self) -> float:
        return median(
            after - before
            for before, after in zip(
                self.starts[WARM_UP:-1], self.starts[WARM_UP + 1 :], strict=True
            )
        )


def step_seconds(case: Case, record: bool) -> float:
    """Return the median time of a step after the warm-up."""
    clock = Clock()
    loader = DataLoader(case.dataset(3 * BATCH_SIZE), batch_size=BATCH_SIZE, shuffle=True)
    with tempfile.TemporaryDirectory() as folder, quiet():
        recorders = [GradientRecorder(Path(folder) / "run")] if record else []
        trainer = quiet_trainer(clock, *recorders, max_epochs=-1, max_steps=STEPS)
        trainer.fit(case.module(), loader)
    return clock.step_seconds()


def multiple(case: Case, rounds: int) -> str:
    """Return the time of a recorded step as a multiple of a plain one."""
    pairs = [(step_seconds(case, False), step_seconds(case, True)) for _ in range(rounds)]
    return f"{median(recording / plain for plain, recording in pairs):.2f}"


def answers(case: Case, sampled: float) -> str:
    if sampled and not case.has_likelihood:
        return "no labels"
    with tempfile.TemporaryDirectory() as folder:
        store, model = train_and_resume(case, Path(folder), sampled)
        scores, _ = ask(store, model, case)
    return "yes" if bool(scores.values.isfinite().all()) else "not finite"


def attempt(function: Callable[..., Any], *arguments: Any, messages: list[str]) -> Any:
    """Return the result of a function; if it fails, keep the message and return nothing."""
    try:
        return function(*arguments)
    except Exception as error:  # Whatever a model fails with is the answer.
        messages.append(f"{type(error).__name__}: {error}".split(";")[0][:120])
        return None


def line(name: str, rounds: int) -> list[str]:
    """Return one line of the table."""
    case, start = ZOO[name], time.perf_counter()
    messages: list[str] = []
    dtypes = (torch.float32, torch.float64)
    comparisons = [attempt(compare, case, dtype, messages=messages) for dtype in dtypes]
    answered = [attempt(answers, case, share, messages=messages) or "no" for share in (0.0, 0.25)]
    is_timed = rounds and answered[0] == "yes"
    factor = attempt(multiple, case, rounds, messages=messages) if is_timed else None
    reached = comparisons[0] or comparisons[1]
    left_out = [f"`{entry.name}`: {entry.reason}" for entry in reached.left_out] if reached else []
    return [
        name,
        f"{reached.recorded / reached.trained:.1%}" if reached else "-",
        *(f"{comparison.error:.0e}" if comparison else "-" for comparison in comparisons),
        *answered,
        factor or "-",
        "; ".join([*left_out, *dict.fromkeys(messages)]).replace("|", "/").replace("\n", " "),
        f"{time.perf_counter() - start:.1f}",
    ]


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=ZOO, default=list(ZOO), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of timed runs; 0 for none")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print_row(list(HEADINGS))
    print_row(["---"] * len(HEADINGS))
    for name in options.models:
        print_row(line(name, options.rounds))


if __name__ == "__main__":
    main()
