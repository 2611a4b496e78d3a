"""Pure functions on matrices whose rows are gradients."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def unit_rows(rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Scale every row to length one; rows of zeros stay zeros.

    >>> import torch
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return functional.normalize(rows, dim=1, eps=1e-30)


def squared_norms(rows: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Return the squared length of every row.

    >>> import torch
    >>> squared_norms(torch.tensor([[3.0, 4.0]]))
    tensor([25.])
    """
    return rows.square().sum(dim=1)
