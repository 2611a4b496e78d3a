"""Do the uses of a run pay? Mislabels, copies, errors and shortcuts, by retraining on real data.

    python tests/benchmarks/uses_debug.py
    python tests/benchmarks/uses_debug.py --uses mislabels errors --seeds 2

One table per use: ours beside random choice and the simplest heuristic, mean and standard deviation
over seeds. Data come with scikit-learn; nothing is downloaded.
"""

import argparse
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from uses_labels import counts, mislabels, out_of_sample, recovery
from uses_neighbors import neighbors
from uses_tasks import ALL, TASKS, recorded, split, train

from tda_lightning import (
    GradientSimilarity,
    InfluenceFunction,
    TracIn,
    Unrolled,
    attribute,
    self_influence,
)
from tda_lightning.applications import Shortcut, explain_errors, find_shortcut
from tda_lightning.attribution import Attributor, Averaged
from tda_lightning.metrics import kept_without_proponents, mislabel_auc

Rows = Iterator[tuple[str, float]]
N_QUERIES, REMOVED = 6, 0.05
METHODS = (TracIn(), Averaged(), Unrolled(), InfluenceFunction(), GradientSimilarity())


def name_of(method: object) -> str:
    return type(method).__name__


def errors(seed: int) -> Rows:
    for task in ALL[:3]:
        noisy = split(task, seed)
        store, model = recorded(task, TensorDataset(noisy.inputs, noisy.given), seed)
        loader = DataLoader(noisy.test, batch_size=50)
        found = {
            name_of(method): explain_errors(
                store, model, loader, k=5, method=method, progress=False
            )
            for method in METHODS
        }
        errors = noisy.test.tensors[0][found["TracIn"].ids]
        nearest = torch.cdist(errors.flatten(1), noisy.inputs.flatten(1))
        shown = {
            **{name: result.opponents.ids for name, result in found.items()},
            "nearest inputs": nearest.topk(5, largest=False).indices,
            "random": torch.arange(len(noisy.given)),
        }
        for name, ids in shown.items():
            yield f"{task.name}, flipped among 5 | {name}", float(noisy.wrong[ids].float().mean())


def removals(seed: int) -> Rows:
    """Remove the top 5 % proponents of a prediction, retrain, and see whether it flips."""
    task = TASKS["digits MLP"]
    noisy = split(task, seed)
    data = TensorDataset(noisy.inputs, noisy.true)
    store, model = recorded(task, data, seed)
    x, y = noisy.test.tensors
    with torch.no_grad():
        logits = model(x)
    gap = logits.topk(2, dim=1).values.diff(dim=1).abs()[:, 0]
    right = (logits.argmax(dim=1) == y).nonzero()[:, 0]
    # The closest calls flip whatever is removed.
    queries = right[gap[right].argsort()[20 : 20 * (N_QUERIES + 1) : 20]]
    chosen = [x[queries], y[queries]]
    n, chance = len(data), torch.Generator().manual_seed(seed)
    same = (noisy.true[None] == y[queries][:, None]).float()
    distance = torch.cdist(x[queries], noisy.inputs)
    rankings: dict[str, Tensor] = {
        **{
            name_of(method): attribute(store, model, chosen, method=method, progress=False).values
            for method in METHODS
        },
        "nearest inputs of its class": same * 1e3 - distance,
        "random of its class": same + torch.rand(len(queries), n, generator=chance) / 2,
    }
    for name, scores in rankings.items():
        flips = []
        for row, query in zip(scores, queries.tolist(), strict=True):
            kept = kept_without_proponents(row.float(), [round(REMOVED * n)])[0]
            part = TensorDataset(noisy.inputs[kept], noisy.true[kept])
            with torch.no_grad():
                predicted = train(task, part, seed)(x[query : query + 1]).argmax()
            flips.append(float(predicted != y[query]))
        yield f"{task.name}, predictions flipped | {name}", sum(flips) / len(flips)


def stamped(images: Tensor) -> Tensor:
    images = images.clone()
    images[..., 0:2, 6:8] = 1.0
    return images


def shortcuts(seed: int) -> Rows:
    """Stamp 60 % of the threes and 1 % of the others; other stamped digits are predicted as 3."""
    task = TASKS["digits CNN"]
    noisy, chance = split(task, seed), torch.Generator().manual_seed(seed)
    threes = noisy.true == 3
    draw = torch.rand(len(threes), generator=chance)
    marked = torch.where(threes, draw < 0.6, draw < 0.01)
    inputs = torch.where(marked[:, None, None, None], stamped(noisy.inputs), noisy.inputs)
    store, model = recorded(task, TensorDataset(inputs, noisy.true), seed)
    x, y = (tensor[noisy.test.tensors[1] != 3] for tensor in noisy.test.tensors)
    with torch.no_grad():
        fooled = model(stamped(x)).argmax(dim=1) == 3
    yield "digits CNN, stamped digits predicted as 3 |", float(fooled.float().mean())
    attributes = {
        "stamp": marked,
        "bright": inputs.mean(dim=(1, 2, 3)) > inputs.mean(),
        "even index": torch.arange(len(inputs)) % 2 == 0,
    }

    def shortcut(method: Attributor, reference: list[Tensor] | None) -> Shortcut:
        return find_shortcut(
            store,
            model,
            [stamped(x[fooled]), y[fooled]],
            attributes,
            classes=noisy.true,
            reference=reference,
            method=method,
            progress=False,
        )

    group = marked & threes
    values_of: dict[str, Tensor] = {
        "self-influence": self_influence(store, progress=False).values,
        "nearest inputs": -(inputs - stamped(x[fooled]).mean(dim=0)).flatten(1).norm(dim=1),
    }
    variants = [("with", method, [x[fooled], y[fooled]]) for method in METHODS]
    for text, method, reference in [*variants, ("without", GradientSimilarity(), None)]:
        found = shortcut(method, reference)
        name = f"{name_of(method)} {text} a reference"
        frame = found.to_pandas()
        for attribute_name in attributes:
            yield f"digits CNN, p-value of {attribute_name} | {name}", frame.p_value[attribute_name]
        yield f"digits CNN, the stamp is first | {name}", float(frame.index[0] == "stamp")
        values_of[name] = found.scores.values
    for name, values in values_of.items():
        values = values.double()
        yield f"digits CNN, AUC of stamped threes | {name}", mislabel_auc(values, group)
        within = mislabel_auc(values[threes], group[threes])
        yield f"digits CNN, the same among threes | {name}", within


USES: dict[str, Callable[[int], Rows]] = {
    "mislabels": mislabels,
    "recovery": recovery,
    "counts": counts,
    "out-of-sample": out_of_sample,
    "neighbors": neighbors,
    "errors": errors,
    "removals": removals,
    "shortcuts": shortcuts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uses", nargs="+", choices=USES, default=list(USES))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for use in arguments.uses:
        values = defaultdict(list)
        for seed in range(arguments.seeds):
            for name, value in USES[use](seed):
                values[name].append(value)
        print(
            f"\n{use}, {arguments.seeds} seeds\n\n| what | how | mean | spread |\n|---|---|---|---|"
        )
        for name, numbers in values.items():
            tensor = torch.tensor(numbers, dtype=torch.float64)
            print(
                f"| {name} | {tensor.mean():.3f} | {tensor.std(unbiased=False):.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
