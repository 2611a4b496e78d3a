"""SampleScores: one score per training sample, such as its self-influence or its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.html_tables import Cell, html_table
from tda_lightning.results.npz import SavedResult
from tda_lightning.results.optional import Series, import_pandas
from tda_lightning.results.ranking import SampleRanking, describe_pairs, require_rank
from tda_lightning.results.sample_groups import positions_of
from tda_lightning.results.tables import write_columns

_INSTEAD = {"proponents": "highest", "opponents": "lowest"}


@dataclass(frozen=True)
class SampleScores(SavedResult):
    """One score per training sample, such as its self-influence.

    Attributes:
        values: Scores, shape ``(n_train,)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the scores.
    """

    values: Float[Tensor, " n_train"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    _axes: ClassVar = ("train_ids",)

    def __len__(self) -> int:
        return len(self.train_ids)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            """Name the method to call instead of those that only scores of queries have."""
            message = f"`SampleScores` has no attribute `{name}`"
            if name in _INSTEAD:
                message += (
                    f", since it holds one score per training sample, such as those of one query. "
                    f"Call `.{_INSTEAD[name]}(k)`, or `.{name}(k)` of the scores of all queries"
                )
            raise AttributeError(f"{message}.", name=name, obj=self)

    def highest(self, k: int = 10) -> SampleRanking:
        """Return the ``k`` highest scores with the ids of their samples, highest first."""
        return self._rank(k, largest=True)

    def lowest(self, k: int = 10) -> SampleRanking:
        """Return the ``k`` lowest scores with the ids of their samples, lowest first."""
        return self._rank(k, largest=False)

    def _rank(self, k: int, largest: bool) -> SampleRanking:
        top = self.values.topk(require_rank(k, len(self.train_ids)), largest=largest)
        return SampleRanking(self.train_ids[top.indices], top.values)

    def of(self, train_ids: Int[Tensor, " k"] | Sequence[int] | SampleRanking) -> SampleScores:
        """Return the scores of some training samples, in the order of the given ids.

        Args:
            train_ids: Ids of training samples, or a ranking of them.

        Raises:
            ValueError: If an id is not among the training samples.
        """
        positions = positions_of(self.train_ids, train_ids)
        return replace(self, values=self.values[positions], train_ids=self.train_ids[positions])

    def to_pandas(self) -> Series:
        """Return a series indexed by training sample."""
        pd = import_pandas()
        return pd.Series(self.values.numpy(), index=pd.Index(self.train_ids.numpy(), name="train"))

    def to_csv(self, path: str | Path) -> None:
        """Write a CSV file with the columns ``train_id`` and ``score``."""
        columns = {"train_id": self.train_ids.numpy(), "score": self.values.numpy()}
        write_columns(path, columns)

    def _repr_html_(self) -> str:
        """Show the highest and the lowest scores, in notebooks."""
        k = min(5, len(self))
        rows: list[list[Cell]] = []
        if k:
            rows = [["highest", self.highest(k)], ["lowest", self.lowest(k)]]
        caption = f"Scores of {len(self):,} training samples by {self.method}"
        return html_table(caption, ["", "sample and score"], rows)

    def __repr__(self) -> str:
        head = f"SampleScores of {len(self.values):,} training samples by {self.method}"
        if not self.values.any():
            return f"{head}\n  all scores are zero"
        return f"{head}\n  highest {describe_pairs(self.highest(min(5, len(self))))}"
