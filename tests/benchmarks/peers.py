"""Whose scores predict retraining? Other libraries, as their documentation calls them.

    python tests/benchmarks/peers.py
    python tests/benchmarks/peers.py --tasks breast-cancer --libraries dattri captum

Tasks, truths and score are those of `lds.py`: the mean over 100 queries of Spearman's correlation,
with its standard error. All libraries get the same training. Those that read checkpoints get one
per epoch. A library that is not installed is left out:

    pip install --no-deps captum==0.9.0 dattri==0.3.0 kronfluence==1.0.1 traker==0.3.2
    pip install accelerate einconv einops opt-einsum safetensors scipy

The table has, for each method at its defaults: both scores; the seconds for the queries, from the
checkpoints or the run; how many of 20 training samples, queried too, help themselves, which checks
the sign; and the best values of a grid of settings. They are chosen by the truth, which flatters
the other libraries: this one stays at its defaults. Times are of one thread.
"""

import argparse
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from lds import Judged, best_of, judge, shown
from lds_tasks import TASKS
from lds_truths import Retrainer, Truth, options_of
from peers_methods import Method, Settings, methods
from peers_trained import Trained, train_models
from torch import Tensor
from torch.utils.data import TensorDataset

TASKS_OF_PEERS = ("digits-mlp", "digits-cnn", "breast-cancer")
MODELS = 5
OWN_SAMPLES = 20
MODULES = {
    "tda_lightning": ["tda_lightning"],
    "captum": ["captum.influence"],
    "dattri": ["dattri.algorithm", "dattri.task"],
    "kronfluence": ["kronfluence.analyzer"],
    "trak": ["trak"],
}
HEADINGS = (f"{'library':13s}", f"{'method':27s}", f"{'same run':12s}", f"{'expected':12s}")
HEADINGS += (
    "seconds",
    "helps itself",
    f"{'best tuned, same run':44s}",
    f"{'best tuned, expected':44s}",
)


class NotFinite(ValueError):
    """Scores are infinite or not a number."""


def scores_of(method: Method, settings: Settings, trained: Trained) -> tuple[Tensor, Tensor]:
    """Compute the scores of the queries, and those of some training samples for themselves.

    Raises:
        NotFinite: If some are no numbers.
    """
    queries, train = trained.task.data().queries.tensors, trained.train[:OWN_SAMPLES]
    both = TensorDataset(*(torch.cat(parts) for parts in zip(queries, train, strict=True)))
    scores = method.scores(trained, both, **settings).detach()
    if not scores.isfinite().all():
        raise NotFinite(f"{1 - float(scores.isfinite().float().mean()):.0%} of the scores")
    return scores[:-OWN_SAMPLES], scores[-OWN_SAMPLES:].diagonal()


def row_of(method: Method, trained: Trained, truths: Sequence[Truth]) -> list[str]:
    """Compute one line of the table."""
    candidates: list[tuple[str, list[Judged]]] = []
    cells = []
    for settings in ({}, *method.grid):
        start = time.perf_counter()
        try:
            scores, own = scores_of(method, settings, trained)
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            print(f"    {method.name}({described(settings)}) fails: {problem}")
            cells = cells or ["fails", "fails", "-", "-"]
            continue
        seconds = f"{time.perf_counter() - start:.1f}"
        judged = [judge(scores, truth) for truth in truths]
        candidates.append((described(settings) or "the defaults", judged))
        cells = cells or [*map(shown, judged), seconds, f"{int((own > 0).sum())} of {len(own)}"]
    tuned = method.grid and candidates
    return [*cells, *(best_of(candidates, place) if tuned else "-" for place in range(2))]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:80]


def described(settings: Settings) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def print_task(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Train, retrain and print the table of one task."""
    task = TASKS[name]
    retrainer = Retrainer(task, options.subsets, options.seeds, options.cache)
    trained = train_models(task, folder / name, options.seed, MODELS)
    run = trained.run
    truths = (retrainer.same_run(run.initial, run.batches), retrainer.expected())
    parameters = sum(value.numel() for value in trained.final.values())
    alone, checkpoints, recorded = trained.times
    print(f"\n{task.title}: {parameters:,} parameters, {len(trained.train):,} samples. Training:")
    print(f"{alone:.1f} s; with checkpoints {checkpoints:.1f} s; recorded {recorded:.1f} s.\n")
    print_row(HEADINGS)
    print_row(["-" * len(heading) for heading in HEADINGS])
    for method in methods():
        if not is_wanted(method, options):
            continue
        if method.largest and parameters > method.largest:
            print(f"    {method.name} is left out: more than {method.largest:,} parameters.")
        else:
            print_row([method.library, method.name, *row_of(method, trained, truths)])


def is_installed(library: str) -> bool:
    """Import a library, so that no time includes that, or print that it is missing."""
    try:
        for module in MODULES[library]:
            import_module(module)
    except ModuleNotFoundError as error:
        print(f"{library} is left out: {error}. To install it, see `--help`.")
        return False
    return True


def is_wanted(method: Method, options: argparse.Namespace) -> bool:
    if method.library in options.missing:
        return False
    wanted = (options.libraries, method.library), (options.methods, method.name)
    return all(not words or any(word in name for word in words) for words, name in wanted)


def print_row(cells: Sequence[str]) -> None:
    padded = (cell.ljust(len(heading)) for cell, heading in zip(cells, HEADINGS, strict=True))
    print(f"| {' | '.join(padded)} |", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS_OF_PEERS, default=TASKS_OF_PEERS)
    parser.add_argument("--libraries", nargs="+", default=[], help="their names")
    parser.add_argument("--methods", nargs="+", default=[], help="words in their names")
    parser.add_argument("--subsets", type=int, default=100, help="retrainings per truth")
    parser.add_argument("--seeds", type=int, default=5, help="of the expected truth")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    return options_of(parser)


def main() -> None:
    options = parsed()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    options.missing = [library for library in MODULES if not is_installed(library)]
    torch.set_num_threads(1)
    gc.freeze()  # kronfluence collects garbage 15 times: not the modules of the other libraries.
    with tempfile.TemporaryDirectory() as folder:
        for name in options.tasks:
            print_task(name, options, Path(folder))


if __name__ == "__main__":
    main()
