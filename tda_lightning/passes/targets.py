r"""Targets: what a query asks about, where that is not its loss.

A target is any function of (module, batch) that returns one number per sample, ``(n,)``, or one per
sample and token, ``(n, T)``. A loss is something to lower, a target something to raise, so it is
the gradient of the *negative* target that is recorded: a positive score still marks a proponent,
which raised the target.

.. math:: g_q = -\nabla_\theta f(x_q; \theta)

:class:`Margin` is what Park et al. (2023), "TRAK: Attributing Model Behavior at Scale", ask about
(eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tda_lightning.arguments import require_choice, require_whole
from tda_lightning.passes.batches import describe
from tda_lightning.passes.training_step import loss_of

Target = Callable[[nn.Module, Any], Tensor]
ClassAxis = Literal[1, -1] | None

_INPUTS = ("x", "input", "inputs", "image", "images", "input_ids", "pixel_values", "features")
_LABELS = ("y", "label", "labels", "target", "targets")


def outputs_of(module: nn.Module, batch: Any) -> Tensor:
    """Call the module's own ``forward`` on a batch's inputs.

    Inputs are the batch itself if that is a tensor, the first element of a sequence, or what a
    mapping has under a common name, ``"x"`` or ``"inputs"`` say.

    Raises:
        ValueError: If there is no ``forward``, or inputs are not found.
        TypeError: If ``forward`` returns neither a tensor nor something with ``logits``.
    """
    inputs = batch
    if isinstance(batch, Mapping):
        inputs = _under(batch, _INPUTS, "inputs", "outputs=")
    elif isinstance(batch, list | tuple) and batch:
        inputs = batch[0]
    try:
        found = module(inputs)
    except NotImplementedError as error:
        if "forward" not in str(error):  # something that `forward` does is not implemented
            raise
        raise ValueError(
            f"`{type(module).__name__}` has no `forward`; expected one that turns a batch's inputs "
            "into logits. Write it, or say how: "
            "`outputs=lambda module, batch: module.net(batch[0])`."
        ) from error
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`{type(module).__name__}.forward` returned {describe(found)}; expected a tensor, or "
            "an object with `logits`. Pass `outputs=`, a function of (module, batch)."
        )
    return logits


def labels_of(batch: Any) -> Tensor:
    """Return the second element of a sequence, or what a mapping has as ``"y"`` or ``"labels"``.

    Raises:
        ValueError: If labels are not found.
    """
    if isinstance(batch, Mapping):
        labels: Tensor = _under(batch, _LABELS, "labels", "labels=")
        return labels
    if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(
        f"No labels are in {describe(batch)}; expected them as second element. Pass `labels=`, a "
        "function of the batch."
    )


@dataclass(frozen=True)
class Loss:
    """The module's own loss: what its ``training_step`` returns. The default."""

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """Return the loss of the batch: unlike a target, one number, and one to lower."""
        return loss_of(module, batch).reshape(())


@dataclass(frozen=True)
class Logit:
    """The logit of a class.

    Attributes:
        index: The class; that of each sample's label if left out.
        outputs: Returns the logits from module and batch.
        labels: Returns the labels from a batch.
        class_axis: Axis of the classes; by default told from the shapes of logits and labels.
    """

    index: int | None = None
    outputs: Callable[[nn.Module, Any], Tensor] = field(default=outputs_of, repr=False)
    labels: Callable[[Any], Tensor] = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise unless every argument is one that can be."""
        _require_fields(self)
        if self.index is not None:
            require_whole("index", self.index, least=0)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one logit per label, or per place where a label would be."""
        outputs = self.outputs(module, batch)
        if self.index is None:
            labels = self.labels(batch)
            logits = _classes_last(outputs, labels, self.class_axis)
            return _at(logits, _checked(labels, logits))
        logits = _classes_last(outputs, self._labels_if_any(batch), self.class_axis)
        if self.index >= logits.shape[-1]:
            raise ValueError(
                f"`Logit(index={self.index})` names no class: the model gives {logits.shape[-1]} "
                f"logits; expected an index from 0 to {logits.shape[-1] - 1}."
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
        outputs: Returns the logits from module and batch.
        labels: Returns the labels from a batch.
        class_axis: Axis of the classes; by default told from the shapes of logits and labels.
    """

    outputs: Callable[[nn.Module, Any], Tensor] = field(default=outputs_of, repr=False)
    labels: Callable[[Any], Tensor] = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise unless every argument is one that can be."""
        _require_fields(self)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one log-probability per label."""
        outputs, labels = self.outputs(module, batch), self.labels(batch)
        logits = _classes_last(outputs, labels, self.class_axis)
        return _at(logits.log_softmax(dim=-1), _checked(labels, logits))


@dataclass(frozen=True)
class Margin:
    r"""How much the label stands out: :math:`\log \frac{p}{1 - p}` of its probability (TRAK's).

    Attributes:
        outputs: Returns the logits from module and batch.
        labels: Returns the labels from a batch.
        class_axis: Axis of the classes; by default told from the shapes of logits and labels.
    """

    outputs: Callable[[nn.Module, Any], Tensor] = field(default=outputs_of, repr=False)
    labels: Callable[[Any], Tensor] = field(default=labels_of, repr=False)
    class_axis: ClassAxis = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise unless every argument is one that can be."""
        _require_fields(self)

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "*n"]:
        """Return one margin per label."""
        outputs, labels = self.outputs(module, batch), self.labels(batch)
        logits = _classes_last(outputs, labels, self.class_axis)
        places = _checked(labels, logits)
        others = logits.scatter(-1, places[..., None], -torch.inf)
        return _at(logits, places) - others.logsumexp(dim=-1)


def per_sample(target: Target, module: nn.Module, batch: Any, n: int) -> Float[Tensor, "n tokens"]:
    """Return what a target says of a batch of ``n`` samples; one column if not per token.

    Raises:
        TypeError: If it is not one number per sample, or per sample and token.
        ValueError: If it is no function.
    """
    if isinstance(target, type) or not callable(target):
        raise ValueError(
            f"the target is {target!r}; expected an object such as `Margin()`, or a function of "
            "(module, batch)"
        )
    found = target(module, batch)
    is_tensor = isinstance(found, Tensor)
    if not is_tensor or found.ndim not in (1, 2) or len(found) != n or not found.requires_grad:
        raise TypeError(
            f"the target `{name_of(target)}` returned {describe(found)} for {n} samples; expected "
            f"one number for each, a tensor of shape ({n},), or one per token, ({n}, T), that "
            "depends on the parameters"
        )
    return found.reshape(n, -1)


def name_of(target: Target) -> str:
    """Return the name of a function, or what an object says of itself."""
    return getattr(target, "__name__", None) or repr(target)


def _under(batch: Mapping[str, Any], names: tuple[str, ...], what: str, argument: str) -> Any:
    for name in names:
        if name in batch:
            return batch[name]
    raise ValueError(
        f"No {what} are in a batch with the keys {list(batch)}; expected one of {list(names)}. "
        f"Pass `{argument}`, a function that takes them from the batch."
    )


def _require_fields(target: Logit | LogProbability | Margin) -> None:
    functions = {"outputs": "module, batch: module.net(batch[0])", "labels": "batch: batch[1]"}
    for name, example in functions.items():
        if not callable(getattr(target, name)):
            raise ValueError(
                f"`{name}` is {getattr(target, name)!r}; expected a function, such as "
                f"`{name}=lambda {example}`."
            )
    if target.class_axis is not None:
        require_choice("class_axis", target.class_axis, Literal[1, -1])


def _classes_last(logits: Any, labels: Any, axis: ClassAxis) -> Tensor:
    """Return the logits with their classes along the last axis."""
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ValueError(
            f"The model gives {describe(logits)}; expected logits, with samples along the first "
            "axis and classes along another. Pass `outputs=`, or a function of (module, batch) as "
            "target."
        )
    found: Tensor = logits.movedim(_told_axis(logits, labels) if axis is None else axis, -1)
    if found.shape[-1] < 2:
        raise ValueError(
            f"The model gives {describe(logits)}; expected logits of at least two classes. Pass "
            "`outputs=`, or a function of (module, batch) as target."
        )
    return found


def _told_axis(logits: Tensor, labels: Any) -> Literal[1, -1]:
    """Tell the axis of classes: axis 1, as torch's losses take them, or the last."""
    if logits.ndim == 2:
        return -1
    given = getattr(labels, "shape", None)
    after_one, last = logits.shape[:1] + logits.shape[2:], logits.shape[:-1]
    if after_one == last or given not in (after_one, last):
        raise ValueError(
            f"Logits are {describe(logits)}, and labels are {describe(labels)}: whether classes "
            "are along axis 1, as in torch's losses, or the last cannot be told from these shapes; "
            "expected one label for each place. Say which: `class_axis=1` or `class_axis=-1`."
        )
    return 1 if given == after_one else -1


# Labels are the user's: of any shape and format until they are checked.
def _checked(labels: Any, logits: Float[Tensor, "*n classes"]) -> Int64[Tensor, "*n"]:
    classes = logits.shape[-1]
    if not _holds_integers(labels) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Labels are {describe(labels)} beside logits of {classes} classes; expected integers "
            f"of shape {tuple(logits.shape[:-1])}. Pass `labels=`."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"Labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to "
            f"{classes - 1}. Write a target that leaves out what is to be ignored."
        )
    places: Tensor = labels.long()
    return places


def _holds_integers(labels: Any) -> bool:
    if not isinstance(labels, Tensor) or labels.dtype == torch.bool:
        return False
    return not (labels.is_floating_point() or labels.is_complex())


def _at(values: Float[Tensor, "*n classes"], places: Int64[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return values.gather(-1, places[..., None])[..., 0]
