"""Slots: nodes of one kind and shape that are recorded together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tda_lightning.gradients.graph.walk import Edge, Meeting
from tda_lightning.gradients.nodes.stacked import StackedRule, stacked_rule_for

# How a parameter's gradients are shrunk: on both sides, or not at all; ``None`` if otherwise.
Shrinking = Literal["both sides", "not at all"] | None
# Returns it for a parameter, with the number of its block.
ShrinkingOf = Callable[[nn.Parameter], tuple[Shrinking, int]]


@dataclass(frozen=True, eq=False)
class Slot:
    """What nodes must have in common to be recorded together.

    Attributes:
        rule: Returns the gradients of such nodes.
        inputs: For each input its position, its parameter, and whether it is the transposed one.
        blocks: The number of the block of each of these parameters.
        kind: Equal for nodes that can be recorded together, if their outputs have equal shapes.
    """

    rule: StackedRule
    inputs: tuple[tuple[int, nn.Parameter, bool], ...]
    blocks: tuple[int, ...]
    kind: Hashable


def slot_of(meeting: Meeting, shrinking: ShrinkingOf) -> Slot | None:
    """Return the slot of a meeting, ``None`` if it is recorded alone.

    Args:
        meeting: The meeting.
        shrinking: Returns how the gradients of a parameter are shrunk, and its block.
    """
    rule = stacked_rule_for(meeting.node)
    if rule is None or rule.weight not in [position for position, _ in meeting.inputs]:
        return None
    inputs, blocks = [], []
    for position, edge in meeting.inputs:
        parameter, is_transposed = _parameter_of(edge)
        if parameter is None:
            return None
        is_matrix = position == rule.weight and rule.is_product
        how, block = shrinking(parameter)
        if (how, parameter.ndim) != (("both sides", 2) if is_matrix else ("not at all", 1)):
            return None
        if not is_matrix and parameter.shape[0] != meeting.shape[-1]:  # It is broadcast.
            return None
        inputs.append((position, parameter, is_transposed))
        blocks.append(block)
    shapes = tuple((position, tuple(p.shape), turned) for position, p, turned in inputs)
    return Slot(rule, tuple(inputs), tuple(blocks), (rule, shapes))


def _parameter_of(edge: Edge) -> tuple[nn.Parameter | None, bool]:
    """Return the parameter that a tensor copies, and whether it transposes it."""
    node, is_transposed = edge[0], False
    while type(node).__name__ in ("TBackward0", "ToCopyBackward0"):
        is_transposed ^= type(node).__name__ == "TBackward0"
        node = node.next_functions[0][0]
    return getattr(node, "variable", None), is_transposed
