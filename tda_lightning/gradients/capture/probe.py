"""Prove which rows belong to which sample: send back the gradient of one sample alone.

Shapes allow several layouts. The gradient of the loss with respect to one sample's outputs alone
reaches exactly that sample's rows in every node, if samples do not depend on each other. With batch
norm it reaches the others' a little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.capture.probe_starts import Cuts, starts_of
from tda_lightning.gradients.graph.sample_layout import SampleLayout, possible_layouts
from tda_lightning.gradients.graph.walk import Meeting, Node, Walk

# The share of a sample's gradient that its rows must hold, where samples are independent.
PROVEN = 0.999
# The same where samples meet in batch statistics or in the loss.
_LIKELY = 0.5
# With fewer samples, a share of one half proves little.
_MIN_SAMPLES_FOR_LIKELY = 4


@dataclass
class Evidence:
    """What the probes of a batch have shown about one meeting.

    Attributes:
        layout: The best layout, or ``None`` if the shape allows none.
        share: The smallest share of a probed sample's gradient in its rows; NaN if none arrived.
        probed: The probed samples.
        arrived: For each of them, the squared gradient per entry of each axis.
    """

    layout: SampleLayout | None
    share: float
    probed: Sequence[int] = ()
    arrived: Sequence[Mapping[int, Tensor]] = ()

    def share_of(self, owners: Tensor) -> float:
        """Return the smallest share of a probed sample's gradient in the rows that it owns."""
        shares = []
        for sample, weights in zip(self.probed, self.arrived, strict=True):
            rows = weights.get(0)
            if rows is not None and float(rows.sum()) > 0:
                shares.append(float(rows[owners.cpu() == sample].sum() / rows.sum()))
        return min(shares) if shares else float("nan")

    def proves(self, n: int) -> bool:
        """Return whether the layout can be relied on."""
        threshold = _LIKELY if n >= _MIN_SAMPLES_FOR_LIKELY else PROVEN
        return self.layout is not None and self.share > threshold

    @property
    def is_empty(self) -> bool:
        """Whether no gradient of the probed samples arrived."""
        return self.share != self.share


# Squared gradient per entry of each axis, by node.
_Weights = Mapping[Node, Mapping[int, Tensor]]


def probe(
    loss: Tensor,
    result: Walk,
    axes: Mapping[Node, Sequence[int]],
    n: int,
    start: int | None = None,
) -> dict[Node, Evidence]:
    """Return the evidence about the layouts of some meetings.

    Args:
        loss: The loss of a batch; its graph is retained.
        result: A walk over its graph.
        axes: The meetings in question, by node, with the axes on which samples can lie.
        n: Number of samples.
        start: Number of a place at which samples are known to be independent, if there is one. The
            others then count only for meetings that no gradient from there reaches.
    """
    meetings = [meeting for meeting in result.meetings if meeting.node in axes]
    best: dict[Node, Evidence] = {}
    shown: dict[Node, Evidence] = {}
    if start is not None and meetings:
        known = next(islice(starts_of(loss, result, n), start, None), None)
        found = _evidence_at(loss, *known, result, meetings, axes, n) if known else {}
        shown = {node: each for node, each in found.items() if not each.is_empty}
        meetings = [meeting for meeting in meetings if meeting.node not in shown]
    n_certain = 0
    for cuts, choice in starts_of(loss, result, n) if meetings else ():
        evidence = _evidence_at(loss, cuts, choice, result, meetings, axes, n)
        is_certain = certainty(evidence) > _CERTAIN
        n_certain += is_certain
        if is_certain and n_certain > 1:  # Some nodes depend on another part of the loss.
            best = {node: _better(found, evidence.get(node)) for node, found in best.items()}
        elif not best or certainty(evidence) > certainty(best):
            best = evidence
        # From a certain start, nothing less than all of a gradient is a proof.
        is_proven = all(found.is_empty or found.share > PROVEN for found in best.values())
        if n_certain == _MAX_CERTAIN or (n_certain and is_proven):
            break
    return best | shown


def _better(first: Evidence, second: Evidence | None) -> Evidence:
    is_better = second is not None and (first.is_empty or second.share > first.share)
    return second if is_better and second is not None else first


# Starts with which samples turn out to be independent, until some nodes are given up.
_MAX_CERTAIN = 4
# Median share with which samples count as independent: masked gradients are exactly zero then.
_CERTAIN = 1 - 1e-6


def _evidence_at(
    loss: Tensor,
    cuts: Cuts,
    choice: int,
    result: Walk,
    meetings: Sequence[Meeting],
    axes: Mapping[Node, Sequence[int]],
    n: int,
) -> dict[Node, Evidence]:
    """Return the evidence of probes that start at some edges, with one of their layouts each."""
    edges = [edge for edge, _ in cuts]
    gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    starts = [
        (edge, grad, layouts[min(choice, len(layouts) - 1)])
        for (edge, layouts), grad in zip(cuts, gradients, strict=True)
        if grad is not None
    ]
    return _evidence_of(starts, result, meetings, axes, n) if starts else {}


def certainty(evidence: Mapping[Node, Evidence]) -> float:
    """Return the median share of a probed sample's gradient in its rows."""
    shares = sorted(e.share for e in evidence.values() if not e.is_empty)
    return shares[len(shares) // 2] if shares else 0.0


_Start = tuple[GradientEdge, Tensor, SampleLayout]


def _evidence_of(
    starts: Sequence[_Start],
    result: Walk,
    meetings: Sequence[Meeting],
    axes: Mapping[Node, Sequence[int]],
    n: int,
) -> dict[Node, Evidence]:
    probed = _strongest_samples(starts, n)
    arrived = [_arriving(starts, result, meetings, axes, n, sample) for sample in probed]
    evidence = {}
    for meeting in meetings:
        layouts = list(possible_layouts(meeting.shape, n, axes[meeting.node]))
        weights = [by_node.get(meeting.node, {}) for by_node in arrived]
        shares = [(_share(each, weights, probed, n), each) for each in layouts]
        known = [pair for pair in shares if pair[0] == pair[0]]
        layout: SampleLayout | None = None
        share = float("nan")
        if known:
            share, layout = max(known, key=lambda pair: pair[0])
        evidence[meeting.node] = Evidence(layout, share, probed, weights)
    return evidence


def _share(
    layout: SampleLayout, arrived: Sequence[Mapping[int, Tensor]], probed: Sequence[int], n: int
) -> float:
    shares = []
    for weights, sample in zip(arrived, probed, strict=True):
        totals = layout.totals(weights[layout.axis], n) if layout.axis in weights else None
        if totals is not None and float(totals.sum()) > 0:
            shares.append(float(totals[sample] / totals.sum()))
    return min(shares) if shares else float("nan")


def _strongest_samples(starts: Sequence[_Start], n: int) -> list[int]:
    """Return two samples with a large gradient; not the first, whose rows are first everywhere."""
    total = torch.zeros(n, dtype=torch.float64)
    for _, grad, layout in starts:
        other = [axis for axis in range(grad.ndim) if axis != layout.axis]
        squares = grad.detach().abs().double().square()
        total += layout.totals(squares.sum(dim=other) if other else squares, n).cpu()
    total[0] = -1 if n > 2 else total[0]
    return total.topk(min(2, n)).indices.tolist()


def _arriving(
    starts: Sequence[_Start],
    result: Walk,
    meetings: Sequence[Meeting],
    axes: Mapping[Node, Sequence[int]],
    n: int,
    sample: int,
) -> _Weights:
    """Return one sample's squared gradient that arrives in each meeting, per entry of an axis."""
    weights: dict[Node, dict[int, Tensor]] = {}

    def keep(node: Node, grads: Sequence[Tensor | None]) -> None:
        grad = grads[0]
        if grad is None:
            return
        squares = grad.detach().abs().double().square()
        weights[node] = {
            axis: squares.sum(dim=[a for a in range(grad.ndim) if a != axis])
            if grad.ndim > 1
            else squares
            for axis in axes[node]
            if axis < grad.ndim
        }

    masked = []
    for _, grad, layout in starts:
        entries = layout.entries_of(grad.shape[layout.axis], n, sample).to(grad.device)
        part = grad.index_select(layout.axis, entries)
        masked.append(torch.zeros_like(grad).index_copy(layout.axis, entries, part))
    backward_to_meetings([edge for edge, _, _ in starts], masked, result, meetings, keep)
    return {
        node: {axis: values.cpu() for axis, values in by_axis.items()}
        for node, by_axis in weights.items()
    }


def backward_to_meetings(
    outputs: Sequence[GradientEdge],
    gradients: Sequence[Tensor],
    result: Walk,
    meetings: Sequence[Meeting],
    receive: Callable[[Node, tuple[Tensor | None, ...]], None],
) -> None:
    """Run a backward pass that computes no parameter's gradient, and retain the graph.

    ``receive`` is called with the node of each meeting and the gradients of its outputs.
    """
    handles = [
        meeting.node.register_prehook(lambda grads, node=meeting.node: receive(node, grads))
        for meeting in meetings
        if not meeting.is_first
    ]
    edges = result.first_edges()
    if not edges:  # The loss does not depend on a recorded parameter.
        return
    try:
        captured = torch.autograd.grad(
            outputs, edges, gradients, retain_graph=True, allow_unused=True
        )
    finally:
        for handle in handles:
            handle.remove()
    observed = {meeting.node for meeting in meetings}
    by_node: dict[Node, dict[int, Tensor | None]] = {}
    for edge, grad in zip(edges, captured, strict=True):
        by_node.setdefault(edge.node, {})[edge.output_nr] = grad
    for node, grads in by_node.items():
        if node in observed and any(grad is not None for grad in grads.values()):
            receive(node, tuple(grads.get(number) for number in range(max(grads) + 1)))
