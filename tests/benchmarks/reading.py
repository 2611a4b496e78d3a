"""What do checksums cost while a run is read?

    python tests/benchmarks/reading.py

Each run of random rows is read with checksums, and as a copy without: its segments have no header,
as those of version 0.1.0, and are therefore not verified. Both take turns, the order changes from
round to round, and every round opens the run afresh; files come from the page cache. Times are
processor times of this process. Printed are the medians of both sides, and the median over the
rounds of their ratio, with its quartiles.

A block of rows is verified when it is read first, so that a second pass costs nothing more. The
last line of each table asks a question instead of only iterating: self-influence by `TracIn`.
"""

import argparse
import gc
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

from tda_lightning import HDF5Store, self_influence
from tda_lightning.stores.hdf5.segment_file import HEADER_BYTES
from tda_lightning.stores.recipe import Block, Recipe
from tda_lightning.stores.row_formats import Storage
from tda_lightning.stores.step import ParameterGroup, Step

# Rows per step, length of a row, number format.
RUNS: dict[str, tuple[int, int, Storage]] = {
    "batch 16, 128 wide": (16, 128, "bfloat16"),
    "batch 128, 2048 wide": (128, 2048, "bfloat16"),
    "batch 128, 2048 wide, int8": (128, 2048, "int8"),
    "batch 2048, 2048 wide": (2048, 2048, "bfloat16"),
}


def write_run(
    path: Path, n: int, dimension: int, storage: Storage, megabytes: int, per_segment: int = 2**20
) -> None:
    """Write a run of random rows, with at most so many steps in a segment."""
    block = Block("net", "Linear", ("net",), ("net.weight",), 1, dimension)
    projector = {"name": "Identity"}
    store = HDF5Store(path, storage=storage)
    store.begin(Recipe((block,), (), projector, dimension, train_ids=((0, 4096),)))
    generator = torch.Generator().manual_seed(0)
    for index in range(megabytes * 2**20 // (2 * n * dimension)):
        if index and index % per_segment == 0:
            store.seal()
        store.append(
            Step(
                index=index,
                epoch=0,
                optimizer="SGD",
                groups=(ParameterGroup(lr=0.1),),
                sample_ids=torch.randint(4096, (n,), generator=generator),
                weights=torch.full((n,), 1 / n),
                sketch=torch.randn(n, dimension, generator=generator),
            )
        )
    store.seal()
    store.release()


def without_headers(path: Path, copy: Path) -> Path:
    """Copy a run, as an earlier version would have written it."""
    shutil.copytree(path, copy)
    for file in copy.glob("segment-*.h5"):
        file.write_bytes(file.read_bytes()[HEADER_BYTES:])
    for file in copy.glob("manifest*"):
        file.unlink()
    return copy


def read(path: Path) -> None:
    for step in HDF5Store.open(path):
        assert len(step.sketch)


def read_twice(path: Path) -> None:
    store = HDF5Store.open(path)
    for _ in range(2):
        for step in store:
            assert len(step.sketch)


def ask(path: Path) -> None:
    self_influence(path, progress=False)


def seconds(work: Callable[[Path], None], path: Path) -> float:
    start = time.process_time()
    work(path)
    return time.process_time() - start


def compare(work: Callable[[Path], None], path: Path, plain: Path, rounds: int) -> str:
    """Return the processor times of both sides, and what checksums add."""
    pairs = []
    for number in range(rounds + 1):
        order = (path, plain) if number % 2 else (plain, path)
        times = {file: seconds(work, file) for file in order}
        pairs.append((times[path], times[plain]))
    with_sums, without = zip(*pairs[1:], strict=True)  # The first round fills the page cache.
    low, middle, high = quantiles([a / b - 1 for a, b in pairs[1:]], n=4)
    return (
        f"{median(without) * 1e3:7.1f} ms; with checksums {median(with_sums) * 1e3:7.1f} ms, "
        f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.disable()  # Its passes over all objects would hit one side or the other at random.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, (n, dimension, storage) in RUNS.items():
            path = folder / label
            write_run(path, n, dimension, storage, options.megabytes)
            plain = without_headers(path, folder / f"{label}, plain")
            print(f"{label}:")
            works = {"iterating": read, "iterating twice": read_twice, "self-influence": ask}
            for title, work in works.items():
                result = compare(work, path, plain, options.rounds)
                print(f"  {title:15} {result}", flush=True)
            shutil.rmtree(path)
            shutil.rmtree(plain)


if __name__ == "__main__":
    main()
