r"""Embedding: one vector per training sample, which scores any query by an inner product.

A method whose scores are linear in the query is a matrix. Its scores for the ``k`` unit vectors
give one vector per training sample, and the score of any query is an inner product,

.. math:: s(q, i) = \langle g_q, e_i \rangle, \qquad e_{i, j} = s(\text{unit vector}_j, i)

For :class:`~tda_lightning.Unrolled` these are the data value embeddings of Wang et al. (2025),
"Capturing the Temporal Dependence of Training Data Influence".
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.averaged import Averaged
from tda_lightning.results.embedding import Embedding
from tda_lightning.stores import Store, open_store
from tda_lightning.stores.arguments import require_object
from tda_lightning.stores.precision import with_double_precision


def embed(
    run: str | Path | Store,
    method: Attributor = Averaged(),
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Embedding:
    """Compute one vector per training sample, from which any query can be scored later.

    The cost is that of attributing ``k`` queries. Memory: three times the scores of these queries,
    and three matrices of ``(k, k)`` numbers.

    Args:
        run: The recorded training: its folder or a store.
        method: The attribution method; its scores must be linear in the query.
        device: Device of the computation. The CPU replaces one without double precision, such as
            ``"mps"``, with a warning.
        progress: Show a progress bar.

    Returns:
        The vectors, shape ``(n_train, k)``, with the ids of their samples.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the method is not linear in the query, or if the run has no steps.
    """
    require_object("method", method)
    if not isinstance(method, Attributor) or not method.is_linear():
        raise ValueError(
            f"`{method!r}` is not linear in the query; expected a method that is, such as "
            "`Unrolled()`, `TracIn()` or `GradientSimilarity('dot')`. Use `attribute` instead."
        )
    store = open_store(run, "run")
    unit_vectors = torch.eye(store.recipe.dimension, dtype=store.recipe.torch_dtype)
    computed_on = with_double_precision(torch.device(device))
    if computed_on != torch.device(device):
        warnings.warn(
            f"`device={str(device)!r}` has no double precision, which methods need; the embedding "
            "is computed on the CPU. Pass `device='cpu'` to omit this warning.",
            stacklevel=2,
        )
    scores = method.attribute(store, unit_vectors.to(computed_on), progress=progress)
    return Embedding(
        scores.values.mT.contiguous(), scores.train_ids, scores.method, scores.provenance
    )
