r"""Find outliers: training samples whose gradients are unlike those of all others.

The score is one minus the mean cosine of a sample's direction with its nearest neighbors. Samples
beyond the outer fence of the scores are flagged, :math:`q_{75} + 3 (q_{75} - q_{25})` (Tukey 1977,
"Exploratory Data Analysis"). Cosines of gradients: Hanawa et al. (2021), "Evaluation of
Similarity-based Explanations". Distances to neighbors: Ramaswamy et al. (2000), "Efficient
Algorithms for Mining Outliers from Large Data Sets".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tda_lightning.applications.neighbors.directions import Directions, gradient_directions
from tda_lightning.applications.notes import Note
from tda_lightning.results.html_tables import ShownInNotebooks, with_notes
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.tables import frame_by_sample
from tda_lightning.stores.arguments import require_whole
from tda_lightning.stores.opening import Run, open_run

_FENCE = 3.0
# Quartiles of fewer samples are unreliable.
_FEW = 50


@dataclass(frozen=True)
class Outliers(ShownInNotebooks):
    """Training samples that are unlike all others.

    Attributes:
        train_ids: Ids of all training samples, shape ``(n_train,)``.
        distances: One minus the mean cosine with the nearest neighbors, from 0 to 2; NaN for
            samples without a gradient. Shape ``(n_train,)``.
        nearest: Id of the most similar other sample, shape ``(n_train,)``.
        fence: Samples with a larger distance are flagged.
        flagged_number: Number of flagged samples.
        notes: What limits the answer, and what to do about it.
    """

    train_ids: Int64[Tensor, " n_train"]
    distances: Float[Tensor, " n_train"]
    nearest: Int64[Tensor, " n_train"]
    fence: float
    flagged_number: int
    notes: tuple[Note, ...]

    @property
    def ids(self) -> Int64[Tensor, " n_flagged"]:
        """Ids of the flagged samples, the most unusual first."""
        return self.train_ids[self._flagged()]

    @property
    def scores(self) -> Float[Tensor, " n_flagged"]:
        """Distances of the flagged samples."""
        return self.distances[self._flagged()]

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per training sample, indexed by its id."""
        is_flagged = torch.zeros(len(self.train_ids), dtype=torch.bool)
        is_flagged[self._flagged()] = True
        columns = {"is_outlier": is_flagged, "distance": self.distances, "nearest": self.nearest}
        return frame_by_sample(self.train_ids, columns)

    def _shown_first(self) -> DataFrame:
        return self.to_pandas().loc[self.ids.tolist()]

    def __repr__(self) -> str:
        order = self._order()
        first = [f"{int(self.train_ids[i])} ({self.distances[i]:.2f})" for i in order[:5]]
        head = f"Outliers: {self.flagged_number:,} of {len(self.train_ids):,} samples"
        lines = [
            f"{head} are farther from their neighbors than {self.fence:.2f}",
            f"  most unusual, with distance: {', '.join(first) or 'none'}",
        ]
        return with_notes(lines, self.notes)

    def _flagged(self) -> Int64[Tensor, " n_flagged"]:
        return self._order()[: self.flagged_number]

    def _order(self) -> Int64[Tensor, " n_known"]:
        """Return the rows of the samples with a distance, the farthest first."""
        order = self.distances.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        known: Tensor = order[~self.distances[order].isnan()]
        return known


def find_outliers(run: Run, *, neighbors: int = 10, number: int | None = None) -> Outliers:
    """Find training samples whose gradients are unlike those of all others.

    Such samples are often foreign to the data, or mislabeled. Time grows with the square of the
    number of samples.

    Args:
        run: A recorded training: its folder or a store.
        neighbors: Number of neighbors to compare each sample with. A group of foreign samples that
            are alike is found only if it is smaller.
        number: Number of samples to flag; by default those beyond the fence.

    Returns:
        The flagged samples, the most unusual first, with a distance for every sample.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument is invalid, or the run holds no rows.
    """
    require_whole("neighbors", neighbors, least=1)
    if number is not None:
        require_whole("number", number, least=0)
    directions = gradient_directions(open_run(run))
    distances, nearest = _distances(directions, neighbors)
    known = distances[~distances.isnan()]
    fence = _fence(known)
    flagged = int((known > fence).sum()) if number is None else min(number, len(known))
    notes = tuple(_notes(directions, len(known), neighbors, flagged))
    return Outliers(directions.train_ids, distances, nearest, fence, flagged, notes)


def _distances(
    directions: Directions, neighbors: int
) -> tuple[Float[Tensor, " n_train"], Int64[Tensor, " n_train"]]:
    """Return the distance of each sample from its neighbors, and the id of the nearest."""
    is_known = directions.is_known()
    n = len(is_known)
    distances = torch.full((n,), torch.nan, dtype=torch.float64)
    nearest = directions.train_ids.clone()
    k = min(neighbors, int(is_known.sum()) - 1)
    if k < 1:
        return distances, nearest
    for start, cosines in directions.cosines():
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf
        cosines[:, ~is_known] = -torch.inf
        top = cosines.topk(k, dim=1)
        part = slice(start, start + len(cosines))
        distances[part] = 1 - top.values.double().mean(dim=1)
        nearest[part] = directions.train_ids[top.indices[:, 0]]
    distances[~is_known] = torch.nan
    return distances, nearest


def _fence(distances: Float[Tensor, " n"]) -> float:
    if not len(distances):
        return torch.inf
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = torch.quantile(distances, quarters).tolist()
    return float(high + _FENCE * (high - low))


def _notes(directions: Directions, n_known: int, neighbors: int, flagged: int) -> Iterator[Note]:
    yield from directions.notes()
    if n_known < _FEW:
        yield Note(f"Only {n_known} samples were compared, too few for a reliable fence.")
    if flagged:
        yield Note(
            "Mislabeled samples are often among them, and rare but correct ones.",
            remedy="Compare with `find_mislabeled`.",
        )
    yield Note(
        f"Foreign samples that resemble more than {neighbors} others cannot be found this way, nor "
        "those that the model treats like the others."
    )
