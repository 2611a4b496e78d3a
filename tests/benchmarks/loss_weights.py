r"""How should the loss of a visit weight its row in the curvature?

    python tests/benchmarks/loss_weights.py
    python tests/benchmarks/loss_weights.py --tasks digits-cnn --subsets 100

Let r be the row of a visit with weight w and T loss terms, and c the trace of its loss's Hessian at
the outputs over the squared gradient there. The empirical Fisher sums r r^T / w. The table compares
other factors of r r^T: powers of c T, the mean of c and 1, and `LossWeighted`, the default.

The truth is that of `lds.py`: retraining of the same run without a tenth of the samples. The table
has the mean over queries of Spearman's correlation with it.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lds import judge
from lds_runs import record
from lds_tasks import TASKS
from lds_truths import Retrainer, options_of
from torch import Tensor

from tda_lightning import InfluenceFunction, Source, Unrolled
from tda_lightning.attribution import Curvature, EmpiricalFisher, LossWeighted
from tda_lightning.attribution.attributor import Attributor
from tda_lightning.stores.step import Step

METHODS: tuple[Callable[[Curvature], Attributor], ...] = (
    lambda curvature: Unrolled(curvature),
    lambda curvature: InfluenceFunction(curvature),
    lambda curvature: Source(curvature=curvature),
)


@dataclass(frozen=True)
class Weighted(Curvature):
    """The empirical Fisher with a factor of c and T for each visit."""

    factor_of: Callable[[Tensor, Tensor], Tensor]

    def factor(self, step: Step) -> Tensor:
        assert step.trace_ratio is not None
        assert step.terms is not None
        squares = self.factor_of(step.trace_ratio, step.terms) / step.weights.clamp_min(1e-30)
        return step.sketch * squares.sqrt()[:, None]


KINDS: dict[str, Curvature] = {
    "1: `EmpiricalFisher()`": EmpiricalFisher(),
    "c T": Weighted(lambda c, T: c * T),
    "(c T)^3/4": Weighted(lambda c, T: (c * T) ** 0.75),
    "(c T)^1/2": Weighted(lambda c, T: (c * T) ** 0.5),
    "(c T)^1/4": Weighted(lambda c, T: (c * T) ** 0.25),
    "(c T + 1) / 2": Weighted(lambda c, T: (c * T + 1) / 2),
    "`LossWeighted()`": LossWeighted(),
}


def print_task(name: str, options: argparse.Namespace) -> None:
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        run = record(task, Path(folder) / "run.tda", {}, options.seed)
        truth = Retrainer(task, options.subsets, 1, options.cache).same_run(
            run.initial, run.batches
        )
        for kind_name, kind in KINDS.items():
            judged = [judge(run.scores(method(kind), "now"), truth)[0] for method in METHODS]
            print(
                f"| {name} | {kind_name} | {' | '.join(f'{j:.3f}' for j in judged)} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seed", type=int, default=0, help="of the recorded run")
    parser.add_argument("--subsets", type=int, default=30, help="to retrain on")
    options = options_of(parser)
    print("| task | factor | Unrolled | InfluenceFunction | Source |\n|---|---|---|---|---|")
    for name in options.tasks:
        print_task(name, options)


if __name__ == "__main__":
    main()
