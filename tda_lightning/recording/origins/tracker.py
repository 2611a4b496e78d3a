"""OriginTracker: follow the samples of a batch through the operations of a training step.

A step may draw the samples of its batch again: ``x[torch.randperm(n)]``, mixup, pairs of an optimal
transport. The graph of the loss does not show that, since data require no gradient. So a mode of
torch sees each operation on the batch, until the data meet a tensor that requires a gradient. It
computes nothing of the training and draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tda_lightning.gradients.graph.walk import Node
from tda_lightning.recording.origins.operations import (
    Origins,
    name_of,
    origins_after,
    origins_assigned,
    tensors_in,
)

# Meetings of one step that are kept at most: most models have few with data of the batch.
_MAX_MEETINGS = 500


class DataMeeting(NamedTuple):
    """Data of the batch in an operation with a tensor that requires a gradient.

    Attributes:
        node: The node of the operation's result.
        origins: The origins of the data.
        is_with_parameter: Whether the other tensor is a parameter, not the output of the model.
    """

    node: Node
    origins: Origins
    is_with_parameter: bool


class OriginTracker(TorchFunctionMode):
    """Follows the rows of a batch's tensors; a context manager.

    Args:
        tensors: The tensors of the batch whose rows are its samples.
        n: Number of samples.

    Attributes:
        meetings: Where data of the batch have met tensors that require a gradient.
    """

    def __init__(self, tensors: Iterable[Tensor], n: int) -> None:
        super().__init__()
        self.n = n
        self.meetings: list[DataMeeting] = []
        self._met: set[Any] = set()
        self._origins: MutableMapping[Tensor, Origins] = WeakTensorKeyDictionary()
        for tensor in tensors:
            self._origins[tensor] = Origins.of_rows(tensor)

    def follow(self, tensors: Iterable[Tensor], sample: int) -> None:
        """Follow the tensors of one sample, before they are joined to a batch."""
        for tensor in tensors:
            origins = Origins.of_sample(tensor, sample)
            is_shared = tensor in self._origins  # Such as a label that a dataset creates once.
            self._origins[tensor] = Origins.none(tensor, torch.float32) if is_shared else origins

    def follow_elements(self, tensors: Iterable[Tensor], owners: Int[Tensor, " rows"]) -> None:
        """Follow tensors whose rows are elements of the given samples."""
        for tensor in tensors:
            self._origins[tensor] = Origins.of_elements(tensor, owners)

    def origins_of(self, value: Any) -> Origins | None:
        """Return the origins of a tensor, ``None`` if they are unknown."""
        if not isinstance(value, Tensor):
            return None
        known = self._origins.get(value)
        return known if known is not None and known.low.shape == value.shape else None

    def forget(self) -> None:
        """Let go of the graph: compiled functions of the step may hold on to this object."""
        self.meetings.clear()
        self._origins.clear()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation of the training, and follow the samples through it."""
        named = kwargs or {}
        result = func(*args, **named)
        try:
            with torch.no_grad():
                self._follow(func, args, named, result)
        except Exception:  # An operation that cannot be followed must not end the training.
            self._forget(result)
        return result

    def _follow(
        self, func: Any, args: Sequence[Any], named: Mapping[str, Any], result: Any
    ) -> None:
        tensors = list(tensors_in(args, named))
        tracked = [each for each in tensors if each in self._origins]
        if not tracked:
            return
        name = name_of(func)
        if name == "__setitem__":
            self._set(args[0], origins_assigned(args[0], args[1], args[2], self.origins_of))
            return
        trained = [each for each in tensors if each.requires_grad and each not in self._origins]
        if trained:
            self._meet(tracked, result, any(each.is_leaf for each in trained))
        elif isinstance(result, Tensor | list | tuple):
            self._set(result, origins_after(func, args, named, result, self.origins_of))

    def _meet(self, tracked: Sequence[Tensor], result: Any, is_with_parameter: bool) -> None:
        self._forget(result)
        outputs = tensors_in([result], {})
        node = next((each.grad_fn for each in outputs if each.grad_fn is not None), None)
        for tensor in tracked if node is not None else ():
            origins = self.origins_of(tensor)
            if origins is None or len(self.meetings) >= _MAX_MEETINGS:
                continue
            low = origins.low
            known = (low.data_ptr(), low.shape, low.stride())
            if is_with_parameter or known not in self._met:  # Every layer may have the same mask.
                self._met.add(known)
                self.meetings.append(DataMeeting(node, origins, is_with_parameter))

    def _set(self, result: Any, origins: Origins | list[Origins] | None) -> None:
        if isinstance(origins, list):
            for tensor, each in zip(result, origins, strict=True):
                self._set(tensor, each)
        elif origins is None:
            self._forget(result)
        elif isinstance(result, Tensor) and origins.low.shape == result.shape:
            place = result.device
            self._origins[result] = origins.through(lambda part: part.to(place))

    def _forget(self, result: Any) -> None:
        for tensor in tensors_in([result], {}):
            self._origins.pop(tensor, None)
