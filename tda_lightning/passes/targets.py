r"""Targets: quantities to attribute instead of the loss, such as a logit or a margin.

A target is any function of (module, batch) that returns one number per sample, ``(n,)``, or one per
sample and token, ``(n, T)``. A label of -100 makes a token no query. Training lowers a loss, but
should raise a target. The recorded row is therefore the gradient of the *negative* target, and
proponents, with positive scores, raised it.

.. math:: g_q = -\nabla_\theta f(x_q; \theta)

:class:`Margin` is the target of Park et al. (2023), "TRAK: Attributing Model Behavior at Scale",
eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tda_lightning.passes.batches import loss_of
from tda_lightning.passes.labelled_logits import (
    ClassAxis,
    class_indices,
    gather,
    is_counted,
    require_logits,
    shifted,
    warn_if_unshifted,
)
from tda_lightning.passes.outputs import Labels, Outputs, labels_of, outputs_of
from tda_lightning.stores.arguments import (
    describe,
    name_of,
    require_choice,
    require_kind,
    require_whole,
)

Target = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """The loss that the module's ``training_step`` returns. The default."""

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """Return the loss of the batch: unlike a target, a single number, to be lowered."""
        return loss_of(module, batch).reshape(())


@dataclass(frozen=True)
class Logit:
    """The logit of a class.

    Attributes:
        index: The class; by default, the label of each sample.
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        class_axis: Axis of the classes; by default inferred from the shapes of logits and labels.
        shift: Whether the logits at a token predict the next one, as in causal language models.
    """

    index: int | None = None
    outputs: Outputs = field(default=outputs_of, repr=False)
    labels: Labels = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)
    shift: bool = False

    def __post_init__(self) -> None:
        _require_fields(self)
        if self.index is not None:
            require_whole("index", self.index, least=0)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one logit per label, or per position that could have a label."""
        if self.index is None:
            logits, classes = _logits_and_classes(self, module, batch)
            return gather(logits, classes)
        outputs, labels = self.outputs(module, batch), self._labels_if_any(batch)
        logits, _ = shifted(outputs, labels, self.class_axis, self.shift)
        if self.index >= logits.shape[-1]:
            raise ValueError(
                f"`Logit(index={self.index})` is out of range: the model returned "
                f"{logits.shape[-1]} logits; expected an index from 0 to {logits.shape[-1] - 1}."
            )
        return logits[..., self.index]

    def is_query(self, batch: Any) -> Bool[Tensor, "n tokens"] | None:
        """Return which tokens are queries; see :meth:`LogProbability.is_query`."""
        return is_counted(self._labels_if_any(batch), self.shift)

    def _labels_if_any(self, batch: Any) -> Any:
        try:
            return self.labels(batch)
        except (ValueError, TypeError, LookupError):
            return None


@dataclass(frozen=True)
class _OfLabels:
    """A target with one number per label; :class:`LogProbability` describes its arguments."""

    outputs: Outputs = field(default=outputs_of, repr=False)
    labels: Labels = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)
    shift: bool = False

    def __post_init__(self) -> None:
        _require_fields(self)

    def is_query(self, batch: Any) -> Bool[Tensor, "n tokens"] | None:
        """Return which tokens are queries: all whose label is not -100; ``None`` for all."""
        return is_counted(self.labels(batch), self.shift)


@dataclass(frozen=True)
class LogProbability(_OfLabels):
    """The log-probability of each sample's label.

    Attributes:
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        class_axis: Axis of the classes; by default inferred from the shapes of logits and labels.
        shift: Whether the logits at a token predict the next one, as in causal language models.
    """

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one log-probability per label."""
        logits, classes = _logits_and_classes(self, module, batch)
        require_logits(logits)
        return gather(logits.log_softmax(dim=-1), classes)


@dataclass(frozen=True)
class Margin(_OfLabels):
    r"""The log-odds :math:`\log \frac{p}{1 - p}` of each sample's label, as in TRAK.

    Its arguments are those of :class:`LogProbability`.
    """

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one margin per label."""
        logits, classes = _logits_and_classes(self, module, batch)
        require_logits(logits)
        others = logits.scatter(-1, classes[..., None], -torch.inf)
        return gather(logits, classes) - others.logsumexp(dim=-1)


def require_target(target: object) -> None:
    """Check that a target is a function, and not the class of one."""
    examples = "`Margin()`, or a function of (module, batch)"
    if isinstance(target, type) or not callable(target):
        require_kind("target", target, Loss, examples)


def per_sample(
    target: Target, module: nn.Module, batch: Any, n: int
) -> tuple[Float[Tensor, "n tokens"], bool]:
    """Return a target's values for a batch of ``n`` samples, and whether they are per token.

    Raises:
        TypeError: If the target returns neither one number per sample nor one per token.
    """
    values = target(module, batch)
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or values.ndim not in (1, 2) or len(values) != n or not values.requires_grad:
        raise TypeError(
            f"the target `{name_of(target)}` returned {describe(values)} for {n} samples; expected "
            f"a tensor that depends on the parameters, with one number per sample, shape ({n},), "
            f"or one per token, shape ({n}, T)"
        )
    return values.reshape(n, -1), values.ndim == 2


def queried_tokens(
    target: Target, batch: Any, values: Float[Tensor, "n tokens"]
) -> Bool[Tensor, "n tokens"]:
    """Return which of a target's values are queries.

    All are, unless the target has a method ``is_query`` that returns a mask for a batch.

    Raises:
        TypeError: If it returns no mask of the shape of the values.
    """
    is_query = getattr(target, "is_query", None)
    mask = None if is_query is None else is_query(batch)
    if mask is None:
        return torch.ones(values.shape, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != values.shape or mask.dtype != torch.bool:
        raise TypeError(
            f"`is_query` of the target `{name_of(target)}` returned {describe(mask)}; expected a "
            f"boolean tensor of shape {tuple(values.shape)}"
        )
    return mask.cpu()


def _logits_and_classes(
    target: Logit | _OfLabels, module: nn.Module, batch: Any
) -> tuple[Tensor, Tensor]:
    """Return the logits with their classes last, and the class of each label."""
    outputs, labels = target.outputs(module, batch), target.labels(batch)
    warn_if_unshifted(batch, labels, target.shift)
    logits, labels = shifted(outputs, labels, target.class_axis, target.shift)
    return logits, class_indices(labels, logits)


def _require_fields(target: Logit | _OfLabels) -> None:
    functions = {"outputs": "module, batch: module.net(batch[0])", "labels": "batch: batch[1]"}
    for name, body in functions.items():
        if not callable(getattr(target, name)):
            raise ValueError(
                f"`{name}` is {getattr(target, name)!r}; expected a function, such as "
                f"`{name}=lambda {body}`."
            )
    if target.class_axis is not None:
        require_choice("class_axis", target.class_axis, Literal[1, -1])
