"""Node rules: how a node in which a parameter meets data yields each sample's gradient.

A rule is one function from a :class:`NodeCall` to a :class:`Contribution`. Add one with
``@node_rule("MyOperationBackward0")``; nodes without a rule use :func:`per_sample_vjp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from tda_lightning.gradients.factors import Dense, GradientFactors
from tda_lightning.gradients.graph.sample_layout import IrregularRows, SampleLayout
from tda_lightning.gradients.nodes.saved_values import saved_value, what_reopens

# Per-sample gradients of a parameter-only tensor: factors of the tensor as a matrix (its first axis
# by all others), or the gradients themselves, shape ``(n, *shape)``.
Contribution = GradientFactors | Tensor


@dataclass(slots=True)
class NodeCall:
    """A node in the backward pass, with the gradients of its outputs.

    Attributes:
        node: The autograd node; it still holds the tensors that it saved in the forward pass.
        grads: Gradient of each output, ``None`` for an output that is not used.
        position: Number of the parameter-only input among the node's inputs.
        shape: Shape of that input.
        layout: Where the samples lie in the first output.
        n: Number of samples.
        alike: Shapes of the inputs with the same layout, by their positions.
        shared: What the calls for the inputs of one node have in common: tensors of a rule, by
            name, and the gradients of :func:`per_sample_vjp`, by position.
    """

    node: Any
    grads: tuple[Tensor | None, ...]
    position: int
    shape: tuple[int, ...]
    layout: SampleLayout | IrregularRows
    n: int
    alike: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    shared: dict[str | int, Tensor] = field(default_factory=dict)

    @property
    def grad(self) -> Tensor:
        """Gradient of the first output."""
        assert self.grads[0] is not None
        return self.grads[0]

    def saved(self, name: str) -> Any:
        """Return a value that the node saved in the forward pass."""
        return saved_value(self.node, name)

    def samples_first(self, values: Tensor) -> Tensor:
        """Return a tensor with the layout of the first output, samples on a separate first axis."""
        return self.layout.samples_first(values, self.n)

    def rows(self, values: Tensor) -> Dense:
        """Return a tensor with the layout of the first output, each sample's rows together.

        Its last axis stays: ``(outer * n * inner, d)`` becomes ``(n, outer * inner, d)``.
        """
        if values.ndim == 2 and self.layout.is_contiguous:
            return Dense(values, self.n)
        return Dense(self.samples_first(values).reshape(-1, values.shape[-1]), self.n)


Rule = Callable[[NodeCall], Contribution]
# Axes of the first output on which samples can lie, from its shape, the shape of the parameter-only
# input, and the position of that input.
Axes = Callable[[Sequence[int], Sequence[int], int], Sequence[int]]


def every_axis(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    """Return all axes."""
    return range(len(output))


def first_axis(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    """Return the first axis."""
    return range(min(1, len(output)))


def all_but_last(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    """Return all axes but the last."""
    return range(len(output) - 1)


def broadcast_axes(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    """Return the axes along which the parameter-only input is repeated."""
    missing = len(output) - len(parameter)
    return [
        axis
        for axis, size in enumerate(output)
        if axis < missing or parameter[axis - missing] != size or size == 1
    ]


@dataclass(frozen=True)
class NodeRule:
    """How a kind of node is recorded, and the axes of its output on which samples can lie."""

    contribution: Rule
    axes: Axes

    @property
    def is_generic(self) -> bool:
        """Whether the node itself is called, once per sample."""
        return self.contribution is per_sample_vjp


_RULES: dict[str, NodeRule] = {}


def node_rule(*names: str, axes: Axes = every_axis) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule for kinds of autograd nodes.

    Args:
        names: Class names of the nodes, such as ``"AddmmBackward0"``.
        axes: Axes of the first output on which samples can lie.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[name] = NodeRule(rule, axes)
        return rule

    return register


def rule_for(node: Any) -> NodeRule:
    """Return the rule registered for a node's kind, or the generic one.

    Rules are for real numbers; the generic one is right for complex ones too.
    """
    rule = _RULES.get(type(node).__name__, _GENERIC)
    if rule is not _GENERIC and node._input_metadata[0].dtype.is_complex:
        return NodeRule(per_sample_vjp, rule.axes)
    return rule


def per_sample_vjp(call: NodeCall) -> Inexact[Tensor, "n ..."]:
    """Call the node once per sample, with the gradients of all other samples set to zero.

    A node is linear in its outputs' gradients, so this is right for any operation, and slow.

    Raises:
        ValueError: If the node is a compiled function, which runs only once.
    """
    if type(call.node).__name__.startswith("CompiledFunction"):
        raise ValueError(
            "A step calls a compiled function that uses parameters, and the graph of such a "
            "function cannot be read; expected a compiled module, which recorded steps run "
            "uncompiled. Compile the model or one of its modules: "
            "`self.net = torch.compile(self.net)`."
        )
    if call.position in call.shared:
        return call.shared.pop(call.position)
    outputs = [_all_but_one_zero(call, grad) for grad in call.grads]
    # A call computes the gradients of all inputs.
    shapes = {**call.alike, call.position: call.shape}
    results: dict[int, list[Tensor]] = {position: [] for position in shapes}
    reopen = what_reopens(call.node)
    for sample in range(call.n):
        input_grads = input_gradients(call.node, [grad and grad(sample) for grad in outputs])
        reopen()
        for position, shape in shapes.items():
            value = input_grads[position]
            if value is None:
                value = call.grad.new_zeros(shape)
            # Autograd itself sums over the axes along which an input was broadcast.
            results[position].append(value if value.shape == shape else value.sum_to_size(shape))
    call.shared.update((position, torch.stack(values)) for position, values in results.items())
    return call.shared.pop(call.position)


def input_gradients(node: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Call a node, and return a gradient for each of its inputs in the graph."""
    is_in_python = isinstance(node, BackwardCFunction)
    results = getattr(node, "apply", node)(*grads)
    values = results if isinstance(results, tuple) else (results,)
    if not is_in_python:
        return values
    # A function in Python has a gradient per argument, but only tensors are inputs in the graph.
    needed = iter(compress(values, node.needs_input_grad))
    return [None if child is None else next(needed) for child, _ in node.next_functions]


def _all_but_one_zero(call: NodeCall, grad: Tensor | None) -> Callable[[int], Tensor] | None:
    if grad is None:
        return None
    layout: SampleLayout | IrregularRows = call.layout
    n = call.n
    if not layout.fits(grad.shape, n):  # An output of another shape, such as a hidden state.
        layout = SampleLayout(list(grad.shape).index(n), 1, None)

    def of_sample(sample: int) -> Tensor:
        entries = layout.entries_of(grad.shape[layout.axis], n, sample).to(grad.device)
        masked = torch.zeros_like(grad)
        return masked.index_copy(layout.axis, entries, grad.index_select(layout.axis, entries))

    return of_sample


_GENERIC = NodeRule(per_sample_vjp, every_axis)
