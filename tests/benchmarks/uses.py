"""Do the uses of a run pay? All by retraining on real data that ships with packages.

    python tests/benchmarks/uses.py
    python tests/benchmarks/uses.py --only prune select --seeds 2

One table: for each use, ours beside random choice and the simplest heuristic, mean and standard
deviation over seeds. Nothing is downloaded. With all uses, it takes more than an hour on one
thread; each use takes some minutes, and its rows are printed when it is done.
"""

import argparse
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import uses_data
import uses_debug
import uses_facts
import uses_unlearn

Measure = Callable[[int], Iterator[tuple[str, float]]]
USES: dict[str, tuple[str, Measure]] = {
    **{name: (name, measure) for name, measure in uses_debug.USES.items()},
    **uses_data.USES,
    **uses_facts.USES,
    **uses_unlearn.USES,
}


def rows_of(name: str, seeds: range) -> Iterator[str]:
    """Yield the rows of the table for one use."""
    title, measure = USES[name]
    values: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        for choice, value in measure(seed):
            values[choice].append(value)
    for choice, numbers in values.items():
        tensor = torch.tensor(numbers, dtype=torch.float64)
        spread = float(tensor.std(correction=1)) if len(tensor) > 1 else 0.0
        choice = choice.replace("|", ":")
        yield f"| {title} | {choice} | {float(tensor.mean()):.3f} | {spread:.3f} | {len(tensor)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=USES, default=list(USES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, 5 by default")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print("| use | choice | mean | std | seeds |\n|---|---|---|---|---|")
    for name in options.only:
        for row in rows_of(name, range(options.first, options.first + options.seeds)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
