"""Logits with their labels: the axis of the classes, the shift of causal models, ignored labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tda_lightning.stores.arguments import describe

ClassAxis = Literal[1, -1] | None
# The label that torch's losses ignore by default.
IGNORED = -100


def shifted(logits: Any, labels: Any, axis: ClassAxis, shift: bool) -> tuple[Tensor, Any]:
    """Return logits with their classes last, and the labels that they predict.

    With ``shift``, the logits at a position predict the label of the next one.

    Raises:
        ValueError: If the shapes do not fit.
    """
    classes_last = _classes_last(logits, labels, axis)
    if not shift:
        return classes_last, labels
    if classes_last.ndim != 3 or classes_last.shape[1] < 2:
        raise ValueError(
            f"`shift=True` with logits {describe(logits)}; expected those of a sequence, shape "
            "(n, T, classes) with T of 2 or more. Leave `shift` out for one label per sample."
        )
    return classes_last[:, :-1], labels[:, 1:] if isinstance(labels, Tensor) else labels


def require_logits(values: Float[Tensor, "*n classes"]) -> None:
    """Check that outputs are logits: those of a softmax layer would be normalized twice.

    Raises:
        ValueError: If all are probabilities. Logarithms of probabilities are logits.
    """
    sums = values.detach().sum(dim=-1)
    if len(values) and (values >= 0).all() and ((sums - 1).abs() < 1e-3).all():
        raise ValueError(
            f"The model returned {describe(values)}, all of them at least 0, with sums of 1, as "
            "behind a softmax; expected logits. Pass `outputs=lambda module, batch: "
            "module(batch[0]).log()`."
        )


def is_counted(labels: Any, shift: bool) -> Bool[Tensor, "n tokens"] | None:
    """Return which labels are not ignored; ``None`` if all count."""
    if not _holds_integers(labels) or labels.ndim != 2:
        return None
    counted: Tensor = (labels[:, 1:] if shift else labels) != IGNORED
    return counted


def warn_if_unshifted(batch: Any, labels: Any, shift: bool) -> None:
    """Warn of labels that equal their inputs, as those of causal models do before a shift."""
    if shift or not _holds_integers(labels) or labels.ndim != 2:
        return
    is_label = labels != IGNORED
    inputs = [v for v in _values(batch) if v is not labels and v.shape == labels.shape]
    same = (v[is_label].equal(labels[is_label].to(v)) for v in inputs if _holds_integers(v))
    if is_label.any() and any(same):
        warnings.warn(
            "The labels equal the inputs, token by token, as in a causal language model, whose "
            "logits at a position predict the next token. The target pairs them without a shift; "
            "expected `shift=True`, such as `LogProbability(shift=True)`.",
            stacklevel=3,
        )


def _values(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | list | tuple):
        return []
    return [value for value in values if isinstance(value, Tensor)]


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
            f"The model returned {describe(logits)}; expected logits of at least two classes. Of a "
            "single logit, pass 0 for the other class: `outputs=lambda module, batch: "
            "nn.functional.pad(module(batch[0]), (1, 0))`, with `labels=lambda batch: "
            "batch[1].long()`."
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
def class_indices(labels: Any, logits: Float[Tensor, "*n classes"]) -> Int64[Tensor, "*n"]:
    """Return the labels as indices of classes; those to ignore become 0."""
    classes = logits.shape[-1]
    if not _holds_integers(labels) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Labels are {describe(labels)} for logits of {classes} classes; expected integers of "
            f"shape {tuple(logits.shape[:-1])}. Pass `labels=`, or name a class, as in `Logit(0)`."
        )
    counted = labels[labels != IGNORED] if labels.ndim == 2 else labels
    if len(counted) and (counted.min() < 0 or counted.max() >= classes):
        raise ValueError(
            f"Labels range from {int(counted.min())} to {int(counted.max())}; expected 0 to "
            f"{classes - 1}, or {IGNORED} for tokens to ignore."
        )
    indices: Tensor = labels.long().clamp_min(0)  # Ignored tokens are no queries.
    return indices


def _holds_integers(labels: Any) -> bool:
    if not isinstance(labels, Tensor) or labels.dtype == torch.bool:
        return False
    return not (labels.is_floating_point() or labels.is_complex())


def gather(
    values: Float[Tensor, "*n classes"], indices: Int64[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """Return the value of each position's class."""
    return values.gather(-1, indices[..., None])[..., 0]
