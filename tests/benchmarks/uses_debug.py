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
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from uses_neighbors import neighbors
from uses_tasks import ALL, TASKS, Classifier, Noisy, Task, accuracy, recorded, split, train

from tda_lightning import LossRecorder, TracIn, attribute, self_influence
from tda_lightning.applications import (
    explain_errors,
    find_mislabeled,
    find_shortcut,
    loss_history,
)
from tda_lightning.metrics import kept_without_proponents, mislabel_auc
from tda_lightning.stores import MemoryStore

Rows = Iterator[tuple[str, float]]
N_QUERIES, REMOVED = 6, 0.05
MEMORIZED = ("digits MLP", "breast cancer")  # The noise costs nothing in a short training.


def final_losses(model: Classifier, noisy: Noisy) -> Tensor:
    with torch.no_grad():
        logits = model(noisy.inputs).double()
    return torch.nn.functional.cross_entropy(logits, noisy.given, reduction="none")


def mislabels(seed: int) -> Rows:
    for task in ALL:
        noisy = split(task, seed)
        store, model = recorded(task, TensorDataset(noisy.inputs, noisy.given), seed)
        trusted = [tensor[:30] for tensor in noisy.test.tensors]
        found = find_mislabeled(store, model, trusted=trusted, progress=False)
        suspicions = {
            "find_mislabeled": -found.label_scores,
            "witness: self-influence": found.witnesses["self_influence"],
            "witness: predicted left-out loss": found.witnesses["left_out_loss"],
            "witness: opposition to 30 trusted": found.witnesses["opposition"],
            "plain loss at the end": final_losses(model, noisy),
            "random": torch.rand(len(noisy.given), generator=torch.Generator().manual_seed(seed)),
        }
        for name, suspicion in suspicions.items():
            yield f"{task.name}, AUC | {name}", mislabel_auc(suspicion.double(), noisy.wrong)
        n_wrong = int(noisy.wrong.sum())
        yield f"{task.name}, number / true | find_mislabeled", found.estimated_number / n_wrong
        if task.name in MEMORIZED:
            yield from recovery(replace(task, epochs=4 * task.epochs), noisy, seed)


def recovery(task: Task, noisy: Noisy, seed: int) -> Rows:
    """Yield the accuracies of a training that memorizes, before and after removal."""
    store, model = recorded(task, TensorDataset(noisy.inputs, noisy.given), seed)
    flagged = find_mislabeled(store, progress=False).is_flagged()
    random = torch.randperm(len(flagged), generator=torch.Generator().manual_seed(seed))
    subsets = {
        "find_mislabeled": (noisy.given, ~flagged),
        "random": (noisy.given, random >= int(flagged.sum())),
        "(the wrong ones removed)": (noisy.given, ~noisy.wrong),
        "(true labels)": (noisy.true, torch.ones_like(flagged)),
    }
    yield f"{task.name}, accuracy | (nothing removed)", accuracy(model, noisy.test)
    for name, (labels, kept) in subsets.items():
        data = TensorDataset(noisy.inputs[kept], labels[kept])
        yield f"{task.name}, accuracy | {name}", accuracy(train(task, data, seed), noisy.test)


def counts(seed: int) -> Rows:
    """Count the wrong labels that trainings of four times the length memorize."""
    for task in ALL:
        for share in (0.05, 0.1, 0.2, 0.3):
            noisy, store = split(task, seed, share), MemoryStore()
            data = TensorDataset(noisy.inputs, noisy.given)
            train(replace(task, epochs=4 * task.epochs), data, seed, LossRecorder(store))
            found = find_mislabeled(store, progress=False)
            means = loss_history(store).mean().values
            where = f"{task.name}, {share:.0%} wrong"
            yield f"{where}, number / true |", found.estimated_number / int(noisy.wrong.sum())
            yield f"{where}, AUC | decisive visits", mislabel_auc(-found.label_scores, noisy.wrong)
            yield f"{where}, AUC | all visits", mislabel_auc(means, noisy.wrong)


def folds(seed: int) -> Rows:
    """Compare with label qualities of cleanlab, which five more trainings feed."""
    from cleanlab.rank import get_label_quality_scores

    for task in ALL:
        noisy = split(task, seed)
        store, model = recorded(task, TensorDataset(noisy.inputs, noisy.given), seed)
        n = len(noisy.given)
        part = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % 5
        held_out = torch.zeros(n, int(noisy.true.max()) + 1)
        for fold in range(5):
            kept, left = part != fold, part == fold
            fitted = train(task, TensorDataset(noisy.inputs[kept], noisy.given[kept]), seed)
            held_out[left] = probabilities(fitted, noisy.inputs[left])
        qualities = {
            "find_mislabeled": find_mislabeled(store, progress=False).label_scores,
            "cleanlab, 5-fold": get_label_quality_scores(noisy.given.numpy(), held_out.numpy()),
            "cleanlab, the same model": get_label_quality_scores(
                noisy.given.numpy(), probabilities(model, noisy.inputs).numpy()
            ),
        }
        for name, quality in qualities.items():
            suspicion = -torch.as_tensor(quality).double()
            yield f"{task.name}, AUC | {name}", mislabel_auc(suspicion, noisy.wrong)


@torch.no_grad()
def probabilities(model: Classifier, inputs: Tensor) -> Tensor:
    logits: Tensor = model(inputs)
    return logits.softmax(dim=1)


def errors(seed: int) -> Rows:
    for task in ALL[:3]:
        noisy = split(task, seed)
        store, model = recorded(task, TensorDataset(noisy.inputs, noisy.given), seed)
        loader = DataLoader(noisy.test, batch_size=50)
        found = explain_errors(store, model, loader, k=5, progress=False)
        nearest = torch.cdist(noisy.test.tensors[0][found.ids].flatten(1), noisy.inputs.flatten(1))
        shown = {
            "explain_errors": found.opponents.ids,
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
        "Unrolled (default)": attribute(store, model, chosen, progress=False).values,
        "TracIn": attribute(store, model, chosen, method=TracIn(), progress=False).values,
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
    found = find_shortcut(
        store,
        model,
        [stamped(x[fooled]), y[fooled]],
        attributes,
        classes=noisy.true,
        reference=[x[fooled], y[fooled]],
        progress=False,
    )
    frame = found.to_pandas()
    for name in attributes:
        yield f"digits CNN, p-value | {name}", frame.p_value[name]
    yield "digits CNN, the stamp is first | find_shortcut", float(frame.index[0] == "stamp")
    group = marked & threes
    influence = self_influence(store, progress=False).values
    centre = stamped(x[fooled]).mean(dim=0).flatten()
    distance = (inputs.flatten(1) - centre).norm(dim=1)
    for name, values in (
        ("find_shortcut", found.scores.values),
        ("self-influence", influence.double()),
        ("nearest inputs", -distance.double()),
    ):
        yield f"digits CNN, AUC of stamped threes | {name}", mislabel_auc(values, group)
        within = mislabel_auc(values[threes], group[threes])
        yield f"digits CNN, the same among threes | {name}", within


USES: dict[str, Callable[[int], Rows]] = {
    "mislabels": mislabels,
    "counts": counts,
    "folds": folds,
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
