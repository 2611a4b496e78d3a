"""Find the nodes of a loss's graph in which parameters meet data.

A tensor made of parameters alone (a parameter, its transpose, a cast, a weight-norm product) is
*parameter-only*. A node *meets* data if one of its inputs is parameter-only and its output has a
row per sample. There the gradient of each sample is still separate from the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

Node = Any
Edge = tuple[Node, int]


@dataclass(slots=True)
class Meeting:
    """A node in which parameters meet data.

    Attributes:
        node: The node.
        inputs: Positions of its parameter-only inputs, each with the edge that leads to it.
        is_first: Whether no other node with samples lies behind it.
        layouts: Where the samples lie at each of these inputs, as far as earlier batches show.
    """

    node: Node
    inputs: Sequence[tuple[int, Edge]]
    is_first: bool
    layouts: Sequence[object] = ()

    @property
    def takes_data(self) -> bool:
        """Whether the operation combines a parameter with data: always, or with earlier results."""
        return not self.is_first or type(self.node).__name__ in TAKES_DATA

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the node's first output."""
        return output_shape((self.node, 0))


@dataclass(frozen=True)
class Normalized:
    """A node whose output goes into a batch norm, and nowhere else.

    Attributes:
        norm: The node of the batch norm.
        chain: The nodes from the batch norm's input to this one: views, and the node itself.
        by_batch: Whether the norm uses the statistics of the batch, not the running ones.
    """

    norm: Node
    chain: tuple[Node, ...]
    by_batch: bool


@dataclass
class Walk:
    """The result of a walk over the graph of a loss.

    Attributes:
        single: The nodes in which parameters meet data, to be recorded one by one.
        alike: Others, to be recorded together with those of the same kind, each with its slot.
        as_meetings: Returns those others as meetings.
        with_samples: All nodes whose outputs depend on samples and on recorded parameters.
        checkpoints: Functions written in Python, which may run modules in the backward pass, and
            whose arguments are no parameters.
        is_reentrant: Whether a part of the graph allows no backward pass but the real one.
        is_sampleless: Whether the loss depends on recorded parameters, but no node has samples.
        normalized: Nodes whose output goes into a batch norm, and nowhere else.
        inputs: The inputs of all nodes, as long as the structure of the graph is not remembered.
    """

    single: list[Meeting] = field(default_factory=list)
    alike: list[tuple[Node, Any]] = field(default_factory=list)
    as_meetings: Callable[[], list[Meeting]] = list
    with_samples: set[Node] = field(default_factory=set)
    checkpoints: list[Node] = field(default_factory=list)
    normalized: dict[Node, Normalized] = field(default_factory=dict)
    is_reentrant: bool = False
    is_sampleless: bool = False
    inputs: dict[Node, tuple[Edge, ...]] = field(default_factory=dict)

    @cached_property
    def meetings(self) -> list[Meeting]:
        """All nodes in which parameters meet data."""
        return [*self.single, *self.as_meetings()]

    @cached_property
    def meeting_of(self) -> dict[Node, Meeting]:
        """The meetings by their nodes."""
        return {meeting.node: meeting for meeting in self.meetings}

    @property
    def has_batch_statistics(self) -> bool:
        """Whether some node normalizes samples by statistics of the batch."""
        return any(map(_normalizes_by_batch, self.with_samples))

    def first_edges(self) -> list[GradientEdge]:
        """Return the outputs of the nodes at which a backward pass without parameters can stop."""
        return [
            GradientEdge(meeting.node, number)
            for meeting in self.meetings
            if meeting.is_first
            for number in range(len(meeting.node._input_metadata))
        ]


# Decides whether a node whose inputs are all parameter-only or constant has a row per sample.
HasSamples = Callable[[Node, int, Edge], bool]


def walk(
    root: Node,
    recorded: Mapping[Tensor, object],
    has_samples: HasSamples,
    visited: dict[Node, tuple[Edge, ...]] | None = None,
) -> Walk:
    """Find all meetings in the graph below a node.

    Args:
        root: The node of the loss, or of another result.
        recorded: The parameters to look for; others count as constants.
        has_samples: Decides about nodes that structure alone leaves undecided.
        visited: Nodes not to visit again, with their inputs; new ones are added.
    """
    visited = {} if visited is None else visited
    result = Walk(inputs=visited)
    with_samples = result.with_samples
    # Nodes whose output is parameter-only. Nodes without recorded parameters are in no set.
    parameter_only: set[Node] = set()
    stack = [] if root is None or root in visited else [root]
    while stack:
        node = stack[-1]
        functions = visited.get(node)
        if functions is None:
            functions = visited[node] = node.next_functions
            pending = [c for c, _ in functions if c is not None and c not in visited]
            if pending:
                stack += pending
                continue
        stack.pop()  # All its inputs are decided; it may be on the stack more than once.
        if not functions:
            if getattr(node, "variable", None) in recorded:
                parameter_only.add(node)
        elif node not in with_samples and node not in parameter_only:
            _classify(node, functions, has_samples, parameter_only, result)
    result.is_sampleless = root in parameter_only
    _drop_used_elsewhere(result, visited)
    return result


def _classify(
    node: Node,
    functions: tuple[Edge, ...],
    has_samples: HasSamples,
    parameter_only: set[Node],
    result: Walk,
) -> None:
    """Decide about a node whose inputs are decided."""
    with_samples = result.with_samples
    inputs, is_later = [], False
    for place, edge in enumerate(functions):
        if edge[0] in parameter_only:
            inputs.append((place, edge))
        elif edge[0] in with_samples:
            is_later = True
    if type(node) not in _ORDINARY:
        is_later = _note(node, functions, not inputs, result) or is_later
    if not inputs:
        if is_later:
            with_samples.add(node)
    elif is_later or (
        _may_hold_data(node, functions, parameter_only) and has_samples(node, *inputs[0])
    ):
        result.single.append(Meeting(node, inputs, not is_later))
        with_samples.add(node)
    else:
        parameter_only.add(node)


# Kinds of nodes about which there is nothing special to note.
_ORDINARY: set[type] = set()


def _note(node: Node, functions: tuple[Edge, ...], may_check: bool, result: Walk) -> bool:
    """Note what is special about a node; return whether samples enter it unseen."""
    name = type(node).__name__
    if name in BATCH_NORMS and functions[0][0] is not None:
        chain = _behind_views(functions[0][0])
        by_batch = bool(getattr(node, "_saved_training", True))
        result.normalized[chain[-1]] = Normalized(node, chain, by_batch)
    is_checkpoint = name == "CheckpointFunctionBackward"
    if isinstance(node, BackwardCFunction):
        result.checkpoints += [node] if may_check else []
        result.is_reentrant |= is_checkpoint and may_check
    elif name not in BATCH_NORMS:
        _ORDINARY.add(type(node))
    return is_checkpoint


def _normalizes_by_batch(node: Node) -> bool:
    """Return whether a node takes statistics of the batch; an instance norm has a batch of one."""
    if "BatchNorm" not in type(node).__name__:
        return False
    shape = output_shape((node, 0))
    return bool(getattr(node, "_saved_training", True)) and not (shape and shape[0] == 1)


BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


def _behind_views(node: Node) -> tuple[Node, ...]:
    """Return a node, and if it is a view, the nodes behind it up to the first that is none."""
    chain = [node]
    while type(chain[-1]).__name__ in ("ViewBackward0", "UnsafeViewBackward0"):
        chain.append(chain[-1].next_functions[0][0])
    return tuple(chain)


def _drop_used_elsewhere(result: Walk, visited: Mapping[Node, tuple[Edge, ...]]) -> None:
    """Keep the normalized nodes that only a batch norm uses: a shortcut may use them too."""
    uses = {node: 0 for entry in result.normalized.values() for node in entry.chain}
    for functions in visited.values() if uses else ():
        for child, _ in functions:
            if child in uses:
                uses[child] += 1
    result.normalized = {
        node: entry
        for node, entry in result.normalized.items()
        if all(uses[link] == 1 for link in entry.chain)
    }


# Operations that always combine a parameter with data.
TAKES_DATA = frozenset(
    f"{name}Backward0"
    for name in (
        "Addmm", "Mm", "Mv", "Bmm", "Baddbmm", "Convolution", "NativeLayerNorm", "FusedRmsNorm",
        "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "PreluKernel",
    )
)  # fmt: skip

# Operations that take data as their first input, or no data.
_NORMS = frozenset(name for name in TAKES_DATA if "Norm" in name)

# Operations that take data in another way than as a differentiable input.
LOOKUPS = frozenset(
    f"{name}Backward0"
    for name in (
        "Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather", "Take", "MaskedFill",
        "Where", "GridSampler2D", "GridSampler3D", "Expand", "Repeat",
    )
)  # fmt: skip


def _may_hold_data(node: Node, functions: tuple[Edge, ...], parameter_only: set[Node]) -> bool:
    """Return whether data can have entered an operation whose differentiable inputs have none.

    A square or a norm of a parameter is parameter-only, whatever its shape looks like. So is a
    weight that a norm has standardized, although such a norm may have no scale and no shift.
    """
    name = type(node).__name__
    if name in _NORMS:
        return functions[0][0] not in parameter_only
    return (
        any(child not in parameter_only for child, _ in functions)
        or name in LOOKUPS
        or isinstance(node, BackwardCFunction)
    )


def output_shape(edge: Edge) -> tuple[int, ...]:
    """Return the shape of one of a node's outputs."""
    node, number = edge
    variable = getattr(node, "variable", None)
    if variable is not None:
        return tuple(variable.shape)
    return tuple(node._input_metadata[number].shape)
