r"""Targets: quantities to attribute instead of the loss, such as a logit or a margin.

A target is any function of (module, batch) that returns one number per sample, ``(n,)``, or one per
sample and token, ``(n, T)``. Training lowers a loss, but should raise a target. The recorded row is
therefore the gradient of the *negative* target, and proponents, with positive scores, raised it.

.. math:: g_q = -\nabla_\theta f(x_q; \theta)

:class:`Margin` is the target of Park et al. (2023), "TRAK: Attributing Model Behavior at Scale",
eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tda_lightning.arguments import describe, name_of, require_choice, require_whole
from tda_lightning.passes.batches import loss_of

Target = Callable[[nn.Module, Any], Tensor]
ClassAxis = Literal[1, -1] | None

_INPUTS = ("x", "input", "inputs", "image", "images", "input_ids", "pixel_values", "features")
_LABELS = ("y", "label", "labels", "target", "targets")


def outputs_of(module: nn.Module, batch: Any) -> Tensor:
    """Return the logits of the module's ``forward`` on a batch's inputs.

    Inputs are the batch if it is a tensor, or its first element if it is a sequence. In a mapping,
    they are found under a common key, such as ``"x"`` or ``"inputs"``.

    Raises:
        ValueError: If there is no ``forward``, or the batch has no inputs.
        TypeError: If ``forward`` returns neither a tensor nor an object with ``logits``.
    """
    inputs = batch
    if isinstance(batch, Mapping):
        inputs = _look_up(batch, _INPUTS, "inputs", "outputs=")
    elif isinstance(batch, list | tuple) and batch:
        inputs = batch[0]
    try:
        result = module(inputs)
    except NotImplementedError as error:
        if "forward" not in str(error):  # An operation inside `forward` is not implemented.
            raise
        raise ValueError(
            f"`{type(module).__name__}` has no `forward`; expected one that turns a batch's inputs "
            "into logits. Define it, or pass a function: "
            "`outputs=lambda module, batch: module.net(batch[0])`."
        ) from error
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`{type(module).__name__}.forward` returned {describe(result)}; expected a tensor, or "
            "an object with `logits`. Pass `outputs=`, a function of (module, batch)."
        )
    return logits


def labels_of(batch: Any) -> Tensor:
    """Return the second element of a sequence, or a mapping's ``"y"`` or ``"labels"``.

    Raises:
        ValueError: If the batch has no labels.
    """
    if isinstance(batch, Mapping):
        labels: Tensor = _look_up(batch, _LABELS, "labels", "labels=")
        return labels
    if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(
        f"There are no labels in {describe(batch)}; expected them as second element. Pass "
        "`labels=`, a function of the batch."
    )


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
    """

    index: int | None = None
    outputs: Callable[[nn.Module, Any], Tensor] = field(default=outputs_of, repr=False)
    labels: Callable[[Any], Tensor] = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        _require_fields(self)
        if self.index is not None:
            require_whole("index", self.index, least=0)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one logit per label, or per position that could have a label."""
        outputs = self.outputs(module, batch)
        if self.index is None:
            labels = self.labels(batch)
            logits = _classes_last(outputs, labels, self.class_axis)
            return _gather(logits, _class_indices(labels, logits))
        logits = _classes_last(outputs, self._labels_if_any(batch), self.class_axis)
        if self.index >= logits.shape[-1]:
            raise ValueError(
                f"`Logit(index={self.index})` is out of range: the model returned "
                f"{logits.shape[-1]} logits; expected an index from 0 to {logits.shape[-1] - 1}."
            )
        return logits[..., self.index]

    def _labels_if_any(self, batch: Any) -> Any:
        try:
            return self.labels(batch)
        except (ValueError, TypeError, LookupError):
            return None


@dataclass(frozen=True)
class LogProbability:
    """The log-probability of each sample's label.

    Attributes:
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        class_axis: Axis of the classes; by default inferred from the shapes of logits and labels.
    """

    outputs: Callable[[nn.Module, Any], Tensor] = field(default=outputs_of, repr=False)
    labels: Callable[[Any], Tensor] = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        _require_fields(self)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one log-probability per label."""
        outputs, labels = self.outputs(module, batch), self.labels(batch)
        logits = _classes_last(outputs, labels, self.class_axis)
        return _gather(logits.log_softmax(dim=-1), _class_indices(labels, logits))


@dataclass(frozen=True)
class Margin:
    r"""The log-odds :math:`\log \frac{p}{1 - p}` of each sample's label, as in TRAK.

    Attributes:
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        class_axis: Axis of the classes; by default inferred from the shapes of logits and labels.
    """

    outputs: Callable[[nn.Module, Any], Tensor] = field(default=outputs_of, repr=False)
    labels: Callable[[Any], Tensor] = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        _require_fields(self)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one margin per label."""
        outputs, labels = self.outputs(module, batch), self.labels(batch)
        logits = _classes_last(outputs, labels, self.class_axis)
        classes = _class_indices(labels, logits)
        others = logits.scatter(-1, classes[..., None], -torch.inf)
        return _gather(logits, classes) - others.logsumexp(dim=-1)


def per_sample(target: Target, module: nn.Module, batch: Any, n: int) -> Float[Tensor, "n tokens"]:
    """Return a target's values for a batch of ``n`` samples; one column if not per token.

    Raises:
        TypeError: If the target returns neither one number per sample nor one per token.
        ValueError: If the target is not a function.
    """
    if isinstance(target, type) or not callable(target):
        raise ValueError(
            f"the target is {target!r}; expected an object such as `Margin()`, or a function of "
            "(module, batch)"
        )
    values = target(module, batch)
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or values.ndim not in (1, 2) or len(values) != n or not values.requires_grad:
        raise TypeError(
            f"the target `{name_of(target)}` returned {describe(values)} for {n} samples; expected "
            f"a tensor that depends on the parameters, with one number per sample, shape ({n},), "
            f"or one per token, shape ({n}, T)"
        )
    return values.reshape(n, -1)


def _look_up(batch: Mapping[str, Any], names: tuple[str, ...], kind: str, argument: str) -> Any:
    for name in names:
        if name in batch:
            return batch[name]
    raise ValueError(
        f"There are no {kind} in a batch with the keys {list(batch)}; expected one of "
        f"{list(names)}. Pass `{argument}`, a function that takes them from the batch."
    )


def _require_fields(target: Logit | LogProbability | Margin) -> None:
    functions = {"outputs": "module, batch: module.net(batch[0])", "labels": "batch: batch[1]"}
    for name, body in functions.items():
        if not callable(getattr(target, name)):
            raise ValueError(
                f"`{name}` is {getattr(target, name)!r}; expected a function, such as "
                f"`{name}=lambda {body}`."
            )
    if target.class_axis is not None:
        require_choice("class_axis", target.class_axis, Literal[1, -1])


def _classes_last(logits: Any, labels: Any, axis: ClassAxis) -> Tensor:
    """Return the logits with their classes along the last axis."""
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ValueError(
            f"The model returned {describe(logits)}; expected logits, with samples along the first "
            "axis and classes along another. Pass `outputs=`, or a function of (module, batch) as "
            "target."
        )
    source = _infer_class_axis(logits, labels) if axis is None else axis
    classes_last: Tensor = logits.movedim(source, -1)
    if classes_last.shape[-1] < 2:
        raise ValueError(
            f"The model returned {describe(logits)}; expected logits of at least two classes. Pass "
            "`outputs=`, or a function of (module, batch) as target."
        )
    return classes_last


def _infer_class_axis(logits: Tensor, labels: Any) -> Literal[1, -1]:
    """Infer whether classes are along axis 1, as in torch's losses, or along the last axis."""
    if logits.ndim == 2:
        return -1
    shape = getattr(labels, "shape", None)
    without_axis_1, without_last = logits.shape[:1] + logits.shape[2:], logits.shape[:-1]
    if without_axis_1 == without_last or shape not in (without_axis_1, without_last):
        raise ValueError(
            f"Logits are {describe(logits)}, and labels are {describe(labels)}. These shapes leave "
            "open whether classes are along axis 1, as in torch's losses, or along the last axis; "
            "expected one label per position. Pass `class_axis=1` or `class_axis=-1`."
        )
    return 1 if shape == without_axis_1 else -1


# Labels come from the user, so their shape and type are unchecked.
def _class_indices(labels: Any, logits: Float[Tensor, "*n classes"]) -> Int64[Tensor, "*n"]:
    classes = logits.shape[-1]
    if not _holds_integers(labels) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Labels are {describe(labels)} for logits of {classes} classes; expected integers of "
            f"shape {tuple(logits.shape[:-1])}. Pass `labels=`."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"Labels range from {int(labels.min())} to {int(labels.max())}; expected 0 to "
            f"{classes - 1}. To ignore labels, write a target that leaves them out."
        )
    indices: Tensor = labels.long()
    return indices


def _holds_integers(labels: Any) -> bool:
    if not isinstance(labels, Tensor) or labels.dtype == torch.bool:
        return False
    return not (labels.is_floating_point() or labels.is_complex())


def _gather(
    values: Float[Tensor, "*n classes"], indices: Int64[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    return values.gather(-1, indices[..., None])[..., 0]
