"""The loss of a training step in a form that ``torch.func`` differentiates twice correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tda_lightning.full_influence.objective import Objective
from tda_lightning.passes.batches import step_of
from tda_lightning.passes.model_state import preserved_metrics
from tda_lightning.stores.arguments import describe


class _ElementaryLayerNorm(TorchFunctionMode):
    """Computes layer norms from elementary operations.

    The derivative of the layer-norm kernel under ``torch.func.vmap`` is wrong without an error (in
    torch 2.13 at least).
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
            "and a step that torch.func can differentiate twice; got "
            f"{type(error).__name__}: {error}{hint}"
        ) from error


def _without_effect(objective: Objective) -> str:
    """Name parameters that the loss of the first batch does not depend on; empty without any."""
    with torch.enable_grad():
        loss = original_loss(objective, 0)
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
    """Return the training step's loss of a batch, for ``torch.func`` to differentiate."""
    with _ElementaryLayerNorm():
        return original_loss(objective, number)


def original_loss(objective: Objective, number: int) -> Float[Tensor, ""]:
    """Return the loss of a batch as the training step computes it."""
    # The other attention kernels have no second derivative. Metrics must not keep tensors that
    # torch.func has wrapped.
    with sdpa_kernel(SDPBackend.MATH), preserved_metrics(objective.model):
        result = step_of(objective.model, objective.batches[number])
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise TypeError(f"the step returned {describe(result)}; expected the loss")
    return loss.reshape(())
