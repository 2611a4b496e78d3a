r"""Gradient similarity: which training samples have gradients that point the way of the query's?

.. math:: s(q, i) = \frac{1}{|T_i|} \sum_{t \in T_i} \cos(g_q, g_i^{(t)}), \qquad
   T_i = \{t : i \in B_t\}

Hanawa et al. (2021), "Evaluation of Similarity-based Explanations", section 2. They compare
gradients at the final weights; here the similarity is averaged over the visits of the run. In
their tests, the cosine passes where the inner product fails, which large gradients dominate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor, mean_over_visits
from tda_lightning.attribution.linalg import unit_rows
from tda_lightning.attribution.steps import unweighted
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_choice
from tda_lightning.stores.step import Step

Measure = Literal["cosine", "dot"]


@dataclass(frozen=True)
class GradientSimilarity(Attributor):
    """Similarity of a sample's and the query's gradient, averaged over the sample's visits.

    Attributes:
        measure: ``"cosine"``, or ``"dot"`` for the inner product of the gradients of single losses.
    """

    measure: Measure = "cosine"
    combine = mean_over_visits

    def __post_init__(self) -> None:
        require_choice("measure", self.measure, Measure)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield each step, with its rows normalized, and the query's gradient."""
        if self.measure == "dot":
            yield from ((unweighted(step), queries) for step in run)
            return
        g_q = unit_rows(queries)
        for step in run:
            yield replace(step, sketch=unit_rows(step.sketch)), g_q

    def is_linear(self) -> bool:
        """Return whether the measure is the inner product; a cosine is not linear."""
        return self.measure == "dot"
