"""Delivery: from a node in the backward pass to per-sample gradients of its parameters.

:class:`NormsBehind` adds the effect through the statistics of a batch norm behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.gradients.capture.layout_inference import UNKNOWN
from tda_lightning.gradients.capture.layout_memory import LayoutMemory
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient, leaves, to_parameters
from tda_lightning.gradients.graph.sample_layout import IrregularRows, SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Meeting, Node, Normalized, Walk, output_shape
from tda_lightning.gradients.nodes import Contribution, NodeCall, rule_for
from tda_lightning.gradients.nodes.normalized import (
    NormBackward,
    contribution_in_front_of,
    has_statistics,
    is_followed,
)


class NormsBehind:
    """Adds to the rows of a weight the effect through the statistics of a batch norm behind it.

    A norm in evaluation mode has constant statistics. Its rows include the effect only for weights
    whose training used the statistics of the batch: the running ones follow those. These weights
    are ``followed``; ``names`` collects them during a training.
    """

    def __init__(self, recorded: Mapping[Tensor, str], followed: Collection[str]) -> None:
        self._recorded, self._followed = recorded, frozenset(followed)
        self._norms: dict[Node, Normalized] = {}
        self._passed: dict[Node, NormBackward] = {}
        self.names: set[str] = set()

    def start(self, walk: Walk) -> None:
        """Forget the last pass, and find the norms of a graph."""
        self.end()
        if not walk.normalized:
            return
        recorded = {meeting.node for meeting in walk.meetings}
        self._norms = {
            entry.norm: entry
            for entry in walk.normalized.values()
            if (entry.by_batch or self._followed)
            and entry.chain[-1] in recorded
            and is_followed(entry.chain[-1])
        }

    def end(self) -> None:
        """Forget the pass."""
        self._norms, self._passed = {}, {}

    def note(
        self,
        node: Node,
        inputs: Sequence[tuple[int, Edge, SampleLayout | IrregularRows]],
        grads: tuple[Tensor | None, ...],
        n: int,
    ) -> None:
        """Remember what a batch norm's node holds: it is gone when the layer's is reached."""
        if not self._norms:
            return
        entry = self._norms.get(node)
        layout = inputs[0][2] if inputs else None
        if entry is None or layout is None or grads[0] is None:
            return
        passed = NormBackward.of(NodeCall(node, grads, 1, (), layout, n))
        if passed is not None:
            self._passed[entry.chain[-1]] = passed

    def contribution(self, call: NodeCall, edge: Edge) -> Contribution | None:
        """Return the gradients of a weight with a batch norm behind it, ``None`` for others."""
        norm = self._passed.get(call.node) if self._passed else None
        if norm is None or not has_statistics(call):
            return None
        names = {self._recorded[leaf] for leaf in leaves(edge) if leaf in self._recorded}
        if norm.by_batch:
            self.names |= names
        elif not names & self._followed:
            return None
        del self._passed[call.node]
        return contribution_in_front_of(norm, call)


# Position of a parameter-only input, the edge that leads to it, and where the samples lie.
Input = tuple[int, Edge, SampleLayout | IrregularRows]
Receiver = Callable[[ParameterGradient], None]
# Positions of inputs that operations add to the others.
_ADDENDS = {"ConvolutionBackward0": (2,), "AddmmBackward0": (0,), "AddBackward0": (0, 1)}
_SUMS = frozenset({"AddBackward0", "SubBackward0"})
NO_EFFECT = "it acts through a batch norm, which subtracts it again, and has no effect"


def _no_owner(meeting: Meeting) -> str:
    kind = type(meeting.node).__name__.removesuffix("Backward0")
    if not meeting.shape:
        return (
            f"it meets the loss of the whole batch in an operation `{kind}`, so that its gradient "
            "belongs to no single sample"
        )
    return (
        f"it meets the samples in an operation `{kind}` of shape {meeting.shape}, whose rows "
        "belong to no single sample"
    )


class Delivery:
    """Delivers the gradients of one batch."""

    def __init__(
        self,
        recorded: Mapping[Tensor, str],
        layouts: LayoutMemory,
        norms: NormsBehind,
        walk: Walk,
        n: int,
    ) -> None:
        self._recorded, self._layouts, self._norms = recorded, layouts, norms
        self._walk, self._n = walk, n

    def inputs(self, meeting: Meeting) -> list[Input]:
        """Return the parameter-only inputs of a meeting whose rows can be separated."""
        known: Sequence[Any] = meeting.layouts or [UNKNOWN] * len(meeting.inputs)
        inputs = []
        for (position, edge), layout in zip(meeting.inputs, known, strict=True):
            if layout is UNKNOWN:
                layout = self._layouts.layout(meeting.node, position, edge)
            if self._is_subtracted(meeting, position):
                self._layouts.lose(edge, NO_EFFECT)
            elif (rows := self._layouts.rows_of(meeting.node, layout)) is not None:
                inputs.append((position, edge, rows))
            elif meeting.shape or type(meeting.node).__name__ not in _SUMS:
                # Else it is a penalty, added to a number: no sample's, and no rows.
                self._layouts.lose(edge, _no_owner(meeting))
        return inputs

    def _is_subtracted(self, meeting: Meeting, position: int) -> bool:
        """Return whether a batch norm subtracts what an input adds: a bias in front of it."""
        entry = self._walk.normalized.get(meeting.node)
        if entry is None or not entry.by_batch:
            return False
        return position in _ADDENDS.get(type(meeting.node).__name__, ())

    def deliver(
        self,
        node: Node,
        inputs: Sequence[Input],
        grads: tuple[Tensor | None, ...],
        receive: Receiver,
    ) -> None:
        """Pass the gradients of a node's parameters to ``receive``."""
        if torch.is_grad_enabled():  # In a backward pass that builds a graph.
            with torch.no_grad():
                self._contribute(node, inputs, grads, receive)
        else:
            self._contribute(node, inputs, grads, receive)

    def _contribute(
        self,
        node: Node,
        inputs: Sequence[Input],
        grads: tuple[Tensor | None, ...],
        receive: Receiver,
    ) -> None:
        if all(grad is None for grad in grads):
            return
        rule, n = rule_for(node), self._n
        self._norms.note(node, inputs, grads, n)
        shared: dict[str | int, Tensor] = {}
        for position, edge, layout in inputs:
            shape = output_shape(edge)
            call = NodeCall(node, grads, position, shape, layout, n, shared=shared)
            if rule.is_generic:
                call.alike = {o: output_shape(e) for o, e, where in inputs if where == layout}
            through = self._norms.contribution(call, edge)
            contribution = rule.contribution(call) if through is None else through
            for gradient in to_parameters(edge, contribution, self._recorded):
                receive(gradient)
