"""Are planted copies and foreign samples found? A part of the benchmark `uses_debug.py`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from uses_tasks import ALL, plant, recorded, split

from tda_lightning import self_influence
from tda_lightning.applications import find_duplicates, find_outliers, loss_history
from tda_lightning.metrics import mislabel_auc


def neighbors(seed: int) -> Iterator[tuple[str, float]]:
    """Plant copies with a little noise, some with another label, and samples of other data."""
    for task in ALL[:3]:
        planted = plant(split(task, seed, flipped=0.0), seed)
        data = TensorDataset(planted.inputs, planted.labels)
        store, model = recorded(task, data, seed)
        by_run = find_duplicates(store)
        by_model = find_duplicates(store, model, DataLoader(data, 50), progress=False)
        inputs = planted.inputs.flatten(1)
        distances = torch.cdist(inputs, inputs).fill_diagonal_(torch.inf)
        suspicions = {
            "find_duplicates, the run alone": by_run.similarities,
            "find_duplicates with model": by_model.similarities,
            "nearest inputs": -distances.amin(dim=1),
        }
        for kind, members in (("same label", planted.same), ("other label", planted.other)):
            others = ~(planted.same | planted.other) | members
            for name, values in suspicions.items():
                score = mislabel_auc(values[others].double(), members[others])
                yield f"{task.name}, AUC of copies, {kind} | {name}", score
        for name, result in (("the run alone", by_run), ("with model", by_model)):
            is_grouped = torch.isin(torch.arange(len(data)), result.ids)
            yield (
                f"{task.name}, copies grouped, same label | {name}",
                share(is_grouped, planted.same),
            )
            yield (
                f"{task.name}, copies grouped, other label | {name}",
                share(is_grouped, planted.other),
            )
            originals = ~(planted.same | planted.other)
            yield f"{task.name}, others grouped | {name}", share(is_grouped, originals)
        found = find_outliers(store)
        is_flagged = torch.isin(torch.arange(len(data)), found.ids)
        nearest = distances.topk(10, dim=1, largest=False).values.mean(dim=1)
        for name, values in (
            ("find_outliers", found.distances),
            ("self-influence", self_influence(store, progress=False).values),
            ("mean loss", loss_history(store).mean().values),
            ("10 nearest inputs", nearest),
        ):
            yield (
                f"{task.name}, AUC of foreign samples | {name}",
                mislabel_auc(values.double(), planted.foreign),
            )
        yield f"{task.name}, foreign flagged | find_outliers", share(is_flagged, planted.foreign)
        rest = ~(planted.foreign | planted.other)
        yield f"{task.name}, others flagged | find_outliers", share(is_flagged, rest)


def share(found: Tensor, members: Tensor) -> float:
    return float(found[members].float().mean())
