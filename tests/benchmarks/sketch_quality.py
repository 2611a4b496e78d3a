"""How accurate are sketched inner products, for how many bytes?

    python tests/benchmarks/sketch_quality.py

Per-sample gradients of a digits CNN, after an epoch of training, are recorded exactly and by every
projector, with several seeds. For each projector and storage, the table has the bytes of a stored
row, an error and a rank correlation. The error is that of inner products between two halves of the
samples, relative to the product of the norms (root mean square). The rank correlation is that with
the exact products.

A second table has the same error of exact rows in other precisions of the network, against rows of
the same weights in float64.
"""

import argparse
import copy
import statistics
from contextlib import AbstractContextManager, nullcontext

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from tda_lightning import (
    CountSketch,
    DenseProjection,
    Identity,
    Kronecker,
    KroneckerCountSketch,
)
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.stores.row_formats import Storage, decode, encode

BYTES = {"as computed": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small CNN after one epoch, and the digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.LayerNorm(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for batch in torch.randperm(len(labels)).split(50):
        optimizer.zero_grad()
        functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    return network, images, labels


def rows_of(
    network: nn.Module,
    batch: tuple[Tensor, Tensor],
    projector: Projector,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the sketched gradient of every sample's loss."""
    recorder = RowRecorder(network, select_parameters(network), {}, projector, dtype)
    with recorder:
        recorder.start(len(batch[0]))
        loss = functional.cross_entropy(network(batch[0]), batch[1], reduction="sum")
        recorder.start_backward(loss)
        torch.autograd.grad(loss, list(network.parameters()))
        return recorder.end_backward().rows


def print_precisions(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Print the error of exact rows in each precision."""
    half = torch.bfloat16
    cases: dict[str, tuple[torch.dtype, AbstractContextManager[object]]] = {
        "float32": (torch.float32, nullcontext()),
        "float16, autocast": (torch.float32, torch.autocast("cpu", torch.float16)),
        "bfloat16, autocast": (torch.float32, torch.autocast("cpu", half)),
        "bfloat16 weights": (half, nullcontext()),
    }
    images, labels = batch
    for name, (dtype, context) in cases.items():
        rounded = copy.deepcopy(network).to(dtype)
        with context:
            rows = rows_of(rounded, (images.to(dtype), labels), Identity()).double()
        wide = (images.to(dtype).double(), labels)
        exact = rows_of(rounded.double(), wide, Identity(), torch.float64)
        first, second = exact.norm(dim=1).chunk(2)
        error = (products(rows) - products(exact)) / (first[:, None] * second).flatten()
        print(f"{name:20s} {float(error.square().mean().sqrt()):.1e}")


def products(rows: Tensor) -> Tensor:
    """Return the inner products between the first and the second half of the rows."""
    first, second = rows.chunk(2)
    return (first @ second.mT).flatten()


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation."""
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def judge(exact: Tensor, rows: Tensor, storage: Storage) -> tuple[float, float]:
    """Return the relative error and the rank correlation of sketched products."""
    restored = decode(*encode(rows, storage), storage)
    first, second = exact.norm(dim=1).chunk(2)
    scale = (first[:, None] * second).flatten()
    error = (products(restored) - products(exact)) / scale
    return float(error.square().mean().sqrt()), rank_correlation(
        products(restored), products(exact)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=400)
    options = parser.parse_args()

    network, images, labels = trained_network()
    batch = (images[: options.samples], labels[: options.samples])
    exact = rows_of(network, batch, Identity())
    cases = [
        *(lambda seed, k=k: KroneckerCountSketch(k, None, seed) for k in (256, 512, 1024, 2048)),
        *(lambda seed, w=w: KroneckerCountSketch(1024, w, seed) for w in (8, 16)),
        *(lambda seed, k=k: CountSketch(k, seed) for k in (256, 1024)),
        *(lambda seed, w=w: Kronecker(w, seed) for w in (8, 16, 32)),
        *(lambda seed, k=k: DenseProjection(k, seed) for k in (256, 1024)),
    ]
    print(f"{exact.shape[1]:,} parameters, {len(exact)} samples, median of {options.seeds} seeds")
    print(f"{'projector':58s} {'storage':12s} {'bytes':>6s} {'error':>7s} {'ranks':>6s}")
    for make in cases:
        recorded = [rows_of(network, batch, make(seed)) for seed in range(options.seeds)]
        storages = BYTES if make(0) == KroneckerCountSketch(1024, None, 0) else ["as computed"]
        for storage in storages:
            judged = [judge(exact, rows, storage) for rows in recorded]
            error, ranks = (statistics.median(column) for column in zip(*judged, strict=True))
            size = BYTES[storage] * recorded[0].shape[1]
            print(f"{make(0)!s:58s} {storage:12s} {size:6d} {error:7.4f} {ranks:6.3f}")
    print_precisions(network, batch)


if __name__ == "__main__":
    main()
