"""Are scores of single samples right? Leave out the strongest ones, one at a time, and retrain.

    python tests/benchmarks/leave_one_out.py
    python tests/benchmarks/leave_one_out.py --tasks digits-mlp --queries 20

A score is the predicted rise of the query's loss if that sample had been missing. For some queries,
the samples with the highest and the lowest scores are left out of the same training, each alone:
with the same initial weights and batches. The table compares predicted and actual rise: the
correlation over all pairs, the share with the right sign, and the median of their ratio.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from lds_retraining import query_losses, retrain, stacked
from lds_runs import Run, record
from lds_tasks import TASKS
from torch import Tensor

from tda_lightning import InfluenceFunction, TracIn, Unrolled
from tda_lightning.attribution import Attributor, Averaged

METHODS: dict[str, Attributor] = {
    "Averaged": Averaged(),
    "Unrolled": Unrolled(),
    "InfluenceFunction": InfluenceFunction(),
    "TracIn": TracIn(),
}


def strongest(scores: Tensor, k: int) -> Tensor:
    """Return the samples with the highest and the lowest scores, shape ``(n_query, 2 * k)``."""
    return torch.cat([scores.topk(k).indices, (-scores).topk(k).indices], dim=1)


def rises(run: Run, samples: Tensor) -> Tensor:
    """Return how much each query's loss rises without each of the samples, shape ``(m, n)``."""
    weighting = torch.ones(len(samples) + 1, len(run.task.data().train))
    weighting[torch.arange(len(samples)), samples] = 0
    weights = retrain(run.task, stacked(run.initial, len(weighting)), run.batches, weighting)
    losses = query_losses(run.task, weights)
    return losses[:-1] - losses[-1:]


def print_task(name: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = record(TASKS[name], Path(folder) / "run.tda", {}, options.seed)
        queries = slice(options.queries)
        scores = {m: run.scores(method, None)[queries] for m, method in METHODS.items()}
        chosen = {m: strongest(values, options.samples) for m, values in scores.items()}
        samples = torch.cat([ids.flatten() for ids in chosen.values()]).unique()
        actual = rises(run, samples)[:, queries].mT  # (n_query, m)
        for method, ids in chosen.items():
            predicted = scores[method].gather(1, ids).flatten().double()
            truth = actual.gather(1, torch.searchsorted(samples, ids)).flatten().double()
            correlation = torch.corrcoef(torch.stack([predicted, truth]))[0, 1]
            agreeing = (predicted.sign() == truth.sign()).double().mean()
            cells = f"{correlation:.3f} | {agreeing:.1%} | {(predicted / truth).median():.2f}"
            print(f"| {name} | {method} | {len(truth)} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["digits-mlp", "digits-cnn", "characters", "breast-cancer", "diabetes"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=names, metavar="TASK")
    parser.add_argument("--queries", type=int, default=10, help="number of queries")
    parser.add_argument("--samples", type=int, default=4, help="per query and sign")
    parser.add_argument("--seed", type=int, default=0, help="of the recorded run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print("| task | method | pairs | correlation | same sign | predicted / actual |")
    print("|---|---|---|---|---|---|")
    for name in options.tasks:
        print_task(name, options)


if __name__ == "__main__":
    main()
