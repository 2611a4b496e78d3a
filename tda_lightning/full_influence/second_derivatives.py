"""Twice: a training step as ``torch.func`` can differentiate it twice, and gets it right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tda_lightning.full_influence.objective import Objective
from tda_lightning.passes.batches import describe
from tda_lightning.passes.model_state import same_metrics
from tda_lightning.passes.training_step import step_of

if TYPE_CHECKING:
    from tda_lightning.full_influence.curvlinops_bindings import Operator


class _Elementary(TorchFunctionMode):
    """Computes layer norms from elementary operations.

    What ``torch.func`` makes of the derivative of their own kernel under ``vmap`` is wrong (in
    torch 2.13 at least), without a word.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        is_norm = getattr(func, "__name__", "") == "layer_norm"
        return (_layer_norm if is_norm else func)(*args, **dict(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dim=axes, keepdim=True)
    variance = (centred * centred).mean(dim=axes, keepdim=True)
    normed = centred * (variance + eps).rsqrt()
    scaled = normed if weight is None else normed * weight
    return scaled if bias is None else scaled + bias


@contextmanager
def differentiating(objective: Objective) -> Iterator[None]:
    """Say of what fails in there that the training step, or its data, do not allow it.

    Raises:
        ValueError: With what was said.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, LookupError) as error:
        raise ValueError(
            f"`{type(objective.model).__name__}.training_step` has no curvature on "
            f"`{objective.argument}` that could be multiplied with: expected batches that it can "
            "take, and a step that torch.func can differentiate twice; it said: "
            f"{type(error).__name__}: {error}"
        ) from error


def whole_loss(objective: Objective, number: int) -> Float[Tensor, ""]:
    """Return what the training step makes of a batch, for ``torch.func`` to differentiate."""
    with _Elementary():
        return _loss(objective, number)


def _loss(objective: Objective, number: int) -> Float[Tensor, ""]:
    # The other kernels of attention have no second derivative; and what a metric keeps of tensors
    # that torch.func has wrapped is not to be seen again.
    with sdpa_kernel(SDPBackend.MATH), same_metrics(objective.model):
        result = step_of(objective.model, objective.batches[number])
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise TypeError(f"it returned {describe(result)}; expected the loss")
    return loss.reshape(())


def require_second_derivative(objective: Objective, hessian: Operator) -> None:
    """Raise unless a Hessian's product with some vector is what backward passes give.

    Raises:
        ValueError: If it is not.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(hessian.shape[0], generator=generator, dtype=torch.float64)
    vector = vector.to(hessian.device, hessian.dtype)
    expected = torch.zeros_like(vector)
    for number in range(len(objective.batches)):
        expected += _share(objective, number) * _product(objective, number, vector)
    missing = float((hessian @ vector - expected).norm() / expected.norm())
    if not missing < 1e-3:
        raise ValueError(
            f"torch.func differentiates `{type(objective.model).__name__}.training_step` wrongly: "
            f"a product with its Hessian is off by {missing:.1%} of what two backward passes "
            "give. Take `curvature=GaussNewton()`, which needs first derivatives only."
        )


def _share(objective: Objective, number: int) -> float:
    """Return the share of a batch's loss in the mean loss."""
    size = objective.sizes[number] if objective.reduction == "mean" else 1
    return size / objective.n


def _product(objective: Objective, number: int, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return the product of a vector with the Hessian of a batch, by two backward passes."""
    parameters = objective.parameters
    with torch.enable_grad():
        loss = _loss(objective, number)
        first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        slope = torch.cat([one.flatten() for one in first]) @ vector
        second = torch.autograd.grad(slope, parameters, materialize_grads=True)
    return torch.cat([one.flatten() for one in second])
