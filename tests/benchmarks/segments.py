"""What do many small segments cost when a run is read?

    python tests/benchmarks/segments.py

A run of random rows is written twice, in a few segments and in many, as a training with a
checkpoint every six steps leaves it. Both are opened, and asked by methods that pass over the run
once or several times; both take turns, and every question opens its run afresh. Files come from the
page cache. Printed are the processor times of this process: medians over the rounds, and the median
of what a segment adds.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from reading import seconds, write_run

from tda_lightning import HDF5Store, InfluenceFunction, TracIn, Unrolled
from tda_lightning.attribution import Attributor

ROWS, WIDTH, STEPS_PER_SEGMENT = 16, 128, 6


def ask(path: Path, method: Attributor) -> None:
    queries = torch.ones(8, WIDTH)
    method.attribute(HDF5Store.open(path), queries, progress=False)


WORKS: dict[str, Callable[[Path], None]] = {
    "opening": lambda path: HDF5Store.open(path),
    "facts": lambda path: list(HDF5Store.open(path).facts),
    "`TracIn`": partial(ask, method=TracIn()),
    "`InfluenceFunction`": partial(ask, method=InfluenceFunction()),
    "`Unrolled`": partial(ask, method=Unrolled()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        few, many = (Path(name) / side for side in ("few", "many"))
        for path, per_segment in ((few, 2**20), (many, STEPS_PER_SEGMENT)):
            write_run(path, ROWS, WIDTH, "bfloat16", options.megabytes, per_segment)
        counts = [len(list(path.glob("segment-*.h5"))) for path in (few, many)]
        print(f"{len(HDF5Store.open(few)):,} steps in {counts[0]} or {counts[1]:,} segments")
        for title, work in WORKS.items():
            times = {few: [], many: []}
            for number in range(options.rounds):
                for path in (few, many) if number % 2 else (many, few):
                    times[path].append(seconds(work, path))
            each = [(b - a) / (counts[1] - counts[0]) for a, b in zip(*times.values(), strict=True)]
            print(
                f"  {title:20} {median(times[few]):6.2f} s, {median(times[many]):6.2f} s; "
                f"{median(each) * 1e3:.2f} ms a segment",
                flush=True,
            )


if __name__ == "__main__":
    main()
