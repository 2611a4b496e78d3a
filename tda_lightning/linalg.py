"""Pure functions on matrices whose rows are gradients."""

from __future__ import annotations

import torch
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


def damped_root(gramian: Float[Tensor, "k k"], damping: float) -> Float[Tensor, "k k"]:
    """Return the lower Cholesky factor of ``gramian + damping * I``.

    Args:
        gramian: Positive semi-definite matrix; it is left as it is.
        damping: Added to the diagonal; larger is safer and blunter.

    Raises:
        ValueError: If the sum has no inverse.

    >>> import torch
    >>> damped_root(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), 1.0)
    tensor([[2., 0.],
            [0., 1.]])
    """
    damped = gramian.clone()
    damped.diagonal().add_(damping)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"A damping of {damping:g} leaves the {len(gramian)} x {len(gramian)} matrix without "
            "an inverse; expected more. Leave `damping` out for a default that suits the run."
        )
    return root
