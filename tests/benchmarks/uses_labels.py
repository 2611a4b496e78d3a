"""Which labels are wrong, how many, and what does their removal bring? Part of `uses_debug.py`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset
from uses_tasks import (
    ALL,
    TASKS,
    Classifier,
    Noisy,
    Task,
    accuracy,
    perceptron,
    recorded,
    split,
    train,
    train_quickly,
)

from tda_lightning import LossRecorder
from tda_lightning.applications import (
    find_mislabeled,
    loss_history,
    out_of_sample_probabilities,
)
from tda_lightning.metrics import mislabel_auc
from tda_lightning.stores import MemoryStore

Rows = Iterator[tuple[str, float]]
WIDE = replace(
    TASKS["digits MLP"], name="digits MLP, 512", network=partial(perceptron, 64, 512, 10)
)
# Networks that memorize wrong labels when they are trained four times as long, and one too small.
MEMORIZING = (TASKS["digits CNN"], WIDE, TASKS["breast cancer"], TASKS["digits MLP"])
N_FOLDS = 5


def final_losses(model: Classifier, noisy: Noisy) -> Tensor:
    with torch.no_grad():
        logits = model(noisy.inputs).double()
    return cross_entropy(logits, noisy.given, reduction="none")


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


def recovery(seed: int) -> Rows:
    """Yield accuracies of long trainings before and after removal, each the mean of three."""
    for task in MEMORIZING:
        task, noisy, store = replace(task, epochs=4 * task.epochs), split(task, seed), MemoryStore()
        data = TensorDataset(noisy.inputs, noisy.given)
        model = train(task, data, seed, LossRecorder(store))
        yield f"{task.name}, wrong labels memorized |", memorized(model, noisy)
        found = find_mislabeled(store, progress=False)
        flagged, n_wrong = found.is_flagged(), int(noisy.wrong.sum())
        yield f"{task.name}, flagged / wrong |", int(flagged.sum()) / n_wrong
        yield f"{task.name}, wrong among the flagged |", float(noisy.wrong[flagged].float().mean())
        cleaner, more = second_look(task, data, flagged, seed)
        yield f"{task.name}, wrong labels missed | find_mislabeled", missed(noisy, flagged)
        yield f"{task.name}, wrong labels missed | and a second look", missed(noisy, more)
        with torch.no_grad():
            predicted = torch.where(flagged, cleaner(noisy.inputs).argmax(dim=1), noisy.given)
        right = (predicted == noisy.true)[flagged].float().mean()
        yield f"{task.name}, predicted labels of the flagged right |", float(right)
        agrees = (predicted == noisy.given)[flagged].float().mean()
        yield f"{task.name}, and equal to the given label |", float(agrees)
        random = torch.randperm(len(flagged), generator=torch.Generator().manual_seed(seed))
        rank = found.label_scores.argsort().argsort()
        everything = torch.ones_like(flagged)
        subsets = {
            "(nothing removed)": (noisy.given, everything),
            "find_mislabeled": (noisy.given, ~flagged),
            "and a second look": (noisy.given, ~more),
            "flagged ones relabelled": (predicted, everything),
            "a fifth fewer": (noisy.given, rank >= round(0.8 * int(flagged.sum()))),
            "a fifth more": (noisy.given, rank >= round(1.2 * int(flagged.sum()))),
            "random": (noisy.given, random >= int(flagged.sum())),
            "(the wrong ones removed)": (noisy.given, ~noisy.wrong),
            "(the wrong and the flagged ones removed)": (noisy.given, ~noisy.wrong & ~flagged),
            "(true labels)": (noisy.true, everything),
        }
        for name, (labels, kept) in subsets.items():
            total = 0.0
            for number in range(3):
                again = train_quickly(task, noisy.inputs[kept], labels[kept], 100 * seed + number)
                total += accuracy(again, noisy.test)
            yield f"{task.name}, accuracy | {name}", total / 3


def second_look(
    task: Task, data: TensorDataset, flagged: Tensor, seed: int
) -> tuple[Classifier, Tensor]:
    """Train without the flagged samples, and flag a tenth as many of the others."""
    store = MemoryStore()
    model = train(task, Subset(data, (~flagged).nonzero()[:, 0]), seed, LossRecorder(store))
    number = round(0.1 * int(flagged.sum()))
    again = find_mislabeled(store, number=number, progress=False)
    more = flagged.clone()
    more[again.ids] = True
    return model, more


def missed(noisy: Noisy, flagged: Tensor) -> float:
    return float((noisy.wrong & ~flagged).sum() / noisy.wrong.sum())


def memorized(model: Classifier, noisy: Noisy) -> float:
    with torch.no_grad():
        predicted = model(noisy.inputs).argmax(dim=1)
    return float((predicted == noisy.given)[noisy.wrong].float().mean())


def counts(seed: int) -> Rows:
    """Count the wrong labels that trainings of four times the length memorize."""
    for task in ALL:
        for share in (0.0, 0.05, 0.1, 0.2, 0.3):
            noisy, store = split(task, seed, share), MemoryStore()
            data = TensorDataset(noisy.inputs, noisy.given)
            train(replace(task, epochs=4 * task.epochs), data, seed, LossRecorder(store))
            found = find_mislabeled(store, progress=False)
            where = f"{task.name}, {share:.0%} wrong"
            if not share:
                yield f"{where}, share flagged |", found.estimated_number / len(data)
                yield f"{where}, a clear group |", float(found.is_clear)
                continue
            means = loss_history(store).mean().values
            yield f"{where}, number / true |", found.estimated_number / int(noisy.wrong.sum())
            yield f"{where}, AUC | decisive visits", mislabel_auc(-found.label_scores, noisy.wrong)
            yield f"{where}, AUC | all visits", mislabel_auc(means, noisy.wrong)


def out_of_sample(seed: int) -> Rows:
    """Compare with 5-fold training, and that with other folds; also where labels are memorized."""
    long = [
        replace(task, name=f"{task.name}, long", epochs=4 * task.epochs)
        for task in (TASKS["breast cancer"], TASKS["wine"])
    ]
    for task in (*ALL, *long):
        noisy = split(task, seed)
        data = TensorDataset(noisy.inputs, noisy.given)
        store, model = recorded(task, data, seed)
        found = out_of_sample_probabilities(store, model, DataLoader(data, 200), progress=False)
        truth, again = (by_folds(task, noisy, seed + part) for part in (0, 100))
        choices = {
            "out_of_sample_probabilities": found.probabilities.float(),
            "in sample": found.in_sample.float(),
            "5-fold again": again,
        }
        expected = of_label(truth, noisy.given)
        for name, predicted in choices.items():
            close = rank_correlation(of_label(predicted, noisy.given), expected)
            yield f"{task.name}, rank correlation with 5-fold | {name}", close
        for name, predicted in {**choices, "5-fold": truth}.items():
            auc = mislabel_auc(-quality(noisy.given, predicted), noisy.wrong)
            yield f"{task.name}, AUC | {name}", auc
        scores = find_mislabeled(store, progress=False).label_scores
        yield f"{task.name}, AUC | find_mislabeled", mislabel_auc(-scores, noisy.wrong)


def of_label(predicted: Tensor, labels: Tensor) -> Tensor:
    return predicted.gather(1, labels[:, None])[:, 0]


def by_folds(task: Task, noisy: Noisy, seed: int) -> Tensor:
    """Return class probabilities of each sample by a model that was trained on other folds."""
    n = len(noisy.given)
    part = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % N_FOLDS
    held_out = torch.zeros(n, int(noisy.true.max()) + 1)
    for fold in range(N_FOLDS):
        kept, left = part != fold, part == fold
        fitted = train_quickly(task, noisy.inputs[kept], noisy.given[kept], seed)
        held_out[left] = probabilities(fitted, noisy.inputs[left])
    return held_out


def quality(given: Tensor, predicted: Tensor) -> Tensor:
    """Return cleanlab's label qualities."""
    from cleanlab.rank import get_label_quality_scores

    return torch.as_tensor(get_label_quality_scores(given.numpy(), predicted.numpy())).double()


@torch.no_grad()
def probabilities(model: Classifier, inputs: Tensor) -> Tensor:
    logits: Tensor = model(inputs)
    return logits.softmax(dim=1)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's rank correlation."""
    ranks = torch.stack([values.double().argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
