r"""Halves: a training step as a model followed by a loss, :math:`c(f(\theta))`, cut by itself.

While the step runs, the calls of torch's loss functions are heard. What such a call is given is an
output of the model; the rest of the step, run again with other outputs put into that call, is the
loss as a function of them. Which calls count is told from the graph of the loss. So nobody writes
a loss function again, and weights, masks and sums of several losses are as the user wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tda_lightning.full_influence.checks import require_finite
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.second_derivatives import differentiating, whole_loss
from tda_lightning.gradients.losses import find_losses_and_penalties

# Loss functions where the graph says so.
_SQUARES = {"pow", "square"}
_HEARD = _SQUARES | {
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "log_softmax",
    "mse_loss",
    "smooth_l1_loss",
}
_REMEDY = (
    "Say where to cut with `GaussNewton(outputs=..., loss=...)`, or take the curvature of the whole"
    " step with `Hessian()`."
)


@dataclass(frozen=True)
class LossCall:
    """A call of a loss function.

    Attributes:
        name: Of the function.
        outputs: What the model gave it: its first argument.
        labels: Its second argument, if it has one.
        settings: Its other arguments.
        value: What it returned.
    """

    name: str
    outputs: Tensor
    labels: Any
    settings: Mapping[str, Any]
    value: Tensor


class _Listener(TorchFunctionMode):
    """Hears the calls of loss functions, and may put other outputs into some of them.

    Args:
        cuts: Numbers of those calls.
        outputs: What to put in, flattened, one after the other.
    """

    def __init__(self, cuts: Sequence[int] = (), outputs: Tensor | None = None) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._cuts = cuts
        self._rest = outputs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        settings = dict(kwargs or {})
        outputs, *others = args or (settings.get("input"),)
        if getattr(func, "__name__", "") not in _HEARD or not isinstance(outputs, Tensor):
            return func(*args, **settings)
        settings.pop("input", None)
        outputs = self._replaced(outputs)
        value = func(outputs, *others, **settings)
        labels = others[0] if others else None
        self.calls.append(LossCall(func.__name__, outputs, labels, settings, value))
        return value

    def _replaced(self, outputs: Tensor) -> Tensor:
        if self._rest is None or len(self.calls) not in self._cuts:
            return outputs
        own, self._rest = self._rest[: outputs.numel()], self._rest[outputs.numel() :]
        return own.view(outputs.shape)


class ModelLossSplit:
    """The training step on every batch of an objective, cut into a model and a loss.

    Args:
        objective: The model and the batches.

    Raises:
        ValueError: If a batch's loss is not a function of what loss functions are given.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        with differentiating(objective):
            self._cuts = [self._find(number) for number in range(len(objective.batches))]

    def outputs(self, number: int) -> Float[Tensor, " m"]:
        """Return all outputs of the model for a batch, one after the other."""
        calls = self._heard(number)
        return torch.cat([call.outputs.flatten() for call in calls])

    def loss(self, outputs: Float[Tensor, " m"], number: int) -> Float[Tensor, ""]:
        """Return the loss of a batch for other outputs."""
        with _Listener(self._cuts[number], outputs):
            return whole_loss(self._objective, number)

    def only_call(self, number: int) -> LossCall:
        """Return the call of a loss function for a batch.

        Raises:
            ValueError: If there are several.
        """
        calls = self._heard(number)
        if len(calls) > 1:
            raise ValueError(
                f"The loss of `{type(self._objective.model).__name__}.training_step` has "
                f"{len(calls)} parts; expected one. Take another solver: `ConjugateGradient()`."
            )
        return calls[0]

    def _heard(self, number: int) -> list[LossCall]:
        with _Listener() as listener:
            whole_loss(self._objective, number)
        return [listener.calls[place] for place in self._cuts[number]]

    def _find(self, number: int) -> tuple[int, ...]:
        model, parameters = self._objective.model, self._objective.parameters
        with torch.enable_grad(), _Listener() as listener:
            loss = whole_loss(self._objective, number)
        require_finite(
            loss,
            f"The loss of batch {number} of `{self._objective.argument}`",
            "Look for NaN or infinity in its samples, and in the weights.",
        )
        cuts = _cuts(listener.calls, loss)
        through = [torch.zeros_like(one) for one in parameters]
        if cuts:
            outputs = torch.cat([listener.calls[place].outputs.flatten() for place in cuts])
            through = _pulled_back(self._slope(outputs, cuts, number), outputs, parameters)
        _require_all(through, _gradient(loss, parameters), type(model).__name__)
        return cuts

    def _slope(self, outputs: Tensor, cuts: Sequence[int], number: int) -> Tensor:
        """Return the gradient of the second half."""
        with torch.enable_grad(), _Listener(cuts, leaf := outputs.detach().requires_grad_()):
            loss = whole_loss(self._objective, number)
        (slope,) = torch.autograd.grad(loss, leaf)
        return slope


def _cuts(calls: Sequence[LossCall], loss: Tensor) -> tuple[int, ...]:
    """Return the numbers of the calls that are loss functions on the graph of the loss."""
    counting = {place: one for place, one in enumerate(calls) if _counts(one, loss)}
    named = [one for one in counting.values() if one.name not in _SQUARES]
    # A square of another loss, as some are weighted with, is no end of the model.
    return tuple(
        place
        for place, one in counting.items()
        if one.name not in _SQUARES or not any(_comes_after(one, other) for other in named)
    )


def _counts(call: LossCall, loss: Tensor) -> bool:
    if not call.outputs.requires_grad:
        return False
    given = _place(call.outputs)
    for node in find_losses_and_penalties(loss):
        if call.value.grad_fn is node.node or tuple(node.outputs)[:2] == given:
            return True
    return False


def _comes_after(call: LossCall, other: LossCall) -> bool:
    (found,) = torch.autograd.grad(
        call.outputs.sum(), other.outputs, retain_graph=True, allow_unused=True
    )
    return found is not None and _place(call.outputs) != _place(other.outputs)


def _place(outputs: Tensor) -> tuple[Any, ...]:
    """Return where a tensor stands on the graph."""
    return tuple(get_gradient_edge(outputs))[:2]


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return list(found)


def _pulled_back(
    slope: Tensor, outputs: Tensor, parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    found = torch.autograd.grad(
        outputs, parameters, slope, retain_graph=True, materialize_grads=True
    )
    return list(found)


def _require_all(through: Sequence[Tensor], whole: Sequence[Tensor], model: str) -> None:
    """Raise unless all of the loss's gradient comes through the outputs."""
    missing = sum(float((a - b).square().sum()) for a, b in zip(through, whole, strict=True))
    size = sum(float(one.square().sum()) for one in whole)
    if missing > 1e-6 * size:
        raise ValueError(
            f"The loss of `{model}.training_step` is not made by torch's loss functions alone: "
            "expected cross-entropy, binary cross-entropy, squared error or Huber's loss. "
            f"{_REMEDY}"
        )
