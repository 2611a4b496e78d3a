"""Pure functions on matrices whose rows are gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unit_rows(rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Scale every row to length one, however long it is; rows of zeros stay zeros.

    >>> import torch
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    # Squares of small numbers vanish, and those of large ones overflow.
    scaled = rows / torch.where(largest > 0, largest, 1)
    lengths: Tensor = scaled.norm(dim=1, keepdim=True)  # 1 or more, except of zeros
    return scaled / lengths.clamp_min(1)


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
        ValueError: If the sum has no inverse, or is not finite.

    >>> import torch
    >>> damped_root(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), 1.0)
    tensor([[2., 0.],
            [0., 1.]])
    """
    damped = gramian.clone()
    damped.diagonal().add_(damping)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed or not root.diagonal().isfinite().all():
        raise ValueError(_why_none(gramian, damped))
    return root


def _why_none(gramian: Float[Tensor, "k k"], damped: Float[Tensor, "k k"]) -> str:
    """Say why a matrix has no root. Its damping came in units of the caller's: no number here."""
    size = f"{len(gramian)} x {len(gramian)} matrix"
    if not gramian.isfinite().all():
        return (
            f"The {size} of curvature holds NaN or infinity; expected finite numbers. Look for a "
            "training that diverged, or for samples whose gradients are not finite."
        )
    if not damped.diagonal().isfinite().all():
        return f"The damping of the {size} is not finite; expected a finite `damping`."
    if not damped.any():
        return (
            f"The {size} of curvature is zero; expected samples whose gradients are not all zero."
        )
    return (
        f"The {size} of curvature is, as damped, without an inverse; expected more. Pass a "
        "larger `damping`."
    )
