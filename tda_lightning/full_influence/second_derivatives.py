"""Products with the second derivatives of a training step's loss, by backward passes.

Every column has its own passes: under ``torch.func.vmap``, the second derivative of a layer norm is
wrong without an error (in torch 2.13 at least).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda_lightning.full_influence.objective import Objective
from tda_lightning.passes.batches import step_of
from tda_lightning.passes.model_state import preserved_metrics
from tda_lightning.stores.arguments import describe


@contextmanager
def differentiation_errors(objective: Objective) -> Iterator[None]:
    """Turn errors raised inside into errors that name the training step and its data.

    Raises:
        ValueError: If the training step cannot take the batches, or be differentiated twice.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, LookupError) as error:
        # The cause is in the step itself, unless torch could not differentiate it.
        hint = _without_effect(objective) if isinstance(error, RuntimeError) else ""
        raise ValueError(
            f"The curvature of `{type(objective.model).__name__}.training_step` on "
            f"`{objective.argument}` cannot be computed: expected batches that the step can take, "
            "and a step that torch can differentiate twice; got "
            f"{type(error).__name__}: {error}{hint}"
        ) from error


def _without_effect(objective: Objective) -> str:
    """Name parameters that the loss of the first batch does not depend on; empty without any."""
    with torch.enable_grad():
        loss = step_loss(objective, 0)
        gradients = torch.autograd.grad(loss, objective.parameters, allow_unused=True)
    without = {p for p, grad in zip(objective.parameters, gradients, strict=True) if grad is None}
    names = [f"`{name}`" for name, p in objective.model.named_parameters() if p in without]
    if not names:
        return ""
    return (
        f". The loss does not depend on {', '.join(names)}. Freeze what has no effect with "
        "`requires_grad_(False)`, or leave it out with `layers=[...]`."
    )


def step_loss(objective: Objective, number: int) -> Float[Tensor, ""]:
    """Return the training step's loss of a batch."""
    with _twice_differentiable(objective):
        result = step_of(objective.model, objective.batches[number])
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise TypeError(f"the step returned {describe(result)}; expected the loss")
    return loss.reshape(())


def hessian_products(objective: Objective, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    """Multiply the Hessian of the mean loss by columns: two backward passes for each."""
    products = torch.zeros_like(vectors)
    for number, share in enumerate(objective.shares):
        loss = step_loss(objective, number)
        gradient = _joined(torch.autograd.grad(loss, objective.parameters, create_graph=True))
        for vector, product in zip(vectors.mT, products.mT, strict=True):
            if gradient.requires_grad:  # Else the loss is linear.
                product += share * _joined(gradients_of(gradient @ vector, objective))
    return products


def gauss_newton_products(
    objective: Objective,
    outputs_of: Callable[[int], Tensor],
    loss_of: Callable[[Tensor, int], Tensor],
    vectors: Float[Tensor, "d n"],
) -> Float[Tensor, "d n"]:
    r"""Multiply the Gauss-Newton matrix of the mean loss, :math:`J^\top H J`, by columns.

    The derivative of :math:`J^\top w`, which is linear in :math:`w`, gives :math:`J v`.

    Args:
        objective: The mean loss.
        outputs_of: Takes the number of a batch, and returns the model's outputs.
        loss_of: Takes outputs and the number of a batch, and returns its loss.
        vectors: The columns.
    """
    products = torch.zeros_like(vectors)
    for number, share in enumerate(objective.shares):
        with _twice_differentiable(objective):
            outputs = outputs_of(number)
            leaf = outputs.detach().requires_grad_()
            loss = loss_of(leaf, number)
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        w = torch.zeros_like(outputs, requires_grad=True)
        parts = torch.autograd.grad(outputs, objective.parameters, w, create_graph=True)
        transposed = _joined(parts)
        for v, product in zip(vectors.mT, products.mT, strict=True):
            (jv,) = torch.autograd.grad(transposed @ v, w, retain_graph=True)
            if slope.requires_grad:  # Else the loss is linear in the outputs.
                (hjv,) = torch.autograd.grad(slope, leaf, jv, retain_graph=True)
                product += share * _joined(gradients_of(outputs, objective, hjv))
    return products


@contextmanager
def _twice_differentiable(objective: Objective) -> Iterator[None]:
    # The other attention kernels have no second derivative. Metrics must not keep graphs.
    with sdpa_kernel(SDPBackend.MATH), preserved_metrics(objective.model):
        yield


def gradients_of(
    outputs: Tensor, objective: Objective, directions: Tensor | None = None
) -> Sequence[Tensor]:
    """Return the gradients of outputs by the parameters, and keep the graph."""
    return torch.autograd.grad(
        outputs, objective.parameters, directions, retain_graph=True, materialize_grads=True
    )


def _joined(parts: Sequence[Tensor]) -> Float[Tensor, " d"]:
    return torch.cat([part.flatten() for part in parts])
