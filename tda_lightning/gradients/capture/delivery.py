"""Delivery: from a node in the backward pass to per-sample gradients of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.gradients.capture.inference import UNKNOWN
from tda_lightning.gradients.capture.layouts import LayoutMemory
from tda_lightning.gradients.capture.norms import NormsBehind
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient, to_parameters
from tda_lightning.gradients.graph.irregular_rows import IrregularRows
from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Meeting, Node, Walk, output_shape
from tda_lightning.gradients.nodes import NodeCall, rule_for

# Position of a parameter-only input, the edge that leads to it, and where the samples lie.
Input = tuple[int, Edge, SampleLayout | IrregularRows]
Receiver = Callable[[ParameterGradient], None]
# Positions of inputs that operations add to the others.
_ADDENDS = {"ConvolutionBackward0": (2,), "AddmmBackward0": (0,), "AddBackward0": (0, 1)}
NO_EFFECT = "it acts through a batch norm, which subtracts it again, and has no effect"


def _no_owner(meeting: Meeting) -> str:
    kind = type(meeting.node).__name__.removesuffix("Backward0")
    return (
        f"it meets the samples in an operation `{kind}` of shape {meeting.shape}, whose rows "
        "belong to no single sample"
    )


class Delivery:
    """Delivers the gradients of one batch.

    Args:
        recorded: The names of the recorded parameters.
        layouts: Decides where the samples lie.
        norms: Adds the effect through batch norms.
        walk: The walk over the graph of the batch.
        n: Number of samples.
    """

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
        """Return the parameter-only inputs of a meeting whose rows can be told apart."""
        known: Sequence[Any] = meeting.layouts or [UNKNOWN] * len(meeting.inputs)
        inputs = []
        for (position, edge), layout in zip(meeting.inputs, known, strict=True):
            if layout is UNKNOWN:
                layout = self._layouts.layout(meeting.node, position, edge)
            if self._is_subtracted(meeting, position):
                self._layouts.lose(edge, NO_EFFECT)
            elif (rows := self._layouts.rows_of(meeting.node, layout)) is not None:
                inputs.append((position, edge, rows))
            elif meeting.shape:  # A penalty is added to a number: no sample's, and no rows.
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
        vjps: dict[int, Tensor] = {}
        for position, edge, layout in inputs:
            call = NodeCall(node, grads, position, output_shape(edge), layout, n, vjps=vjps)
            if rule.is_generic:
                call.alike = {o: output_shape(e) for o, e, where in inputs if where == layout}
            through = self._norms.contribution(call, edge)
            contribution = rule.contribution(call) if through is None else through
            for gradient in to_parameters(edge, contribution, self._recorded):
                receive(gradient)
