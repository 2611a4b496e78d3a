"""Prove which rows belong to which sample: send back the gradient of one sample alone.

Shapes allow several layouts. If samples do not depend on each other, the gradient with respect to
one sample's outputs reaches that sample's rows alone, in every node. With batch norm it reaches the
others' a little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.capture.row_owners import PROVEN, Cuts
from tda_lightning.gradients.capture.tracer import starts_of
from tda_lightning.gradients.graph.sample_layout import (
    IrregularRows,
    KnownRows,
    SampleLayout,
    possible_layouts,
)
from tda_lightning.gradients.graph.walk import Meeting, Node, Walk
from tda_lightning.stores.precision import in_double_precision

# The share of a sample's gradient that its rows must hold, where samples meet in batch statistics
# or in the loss.
_LIKELY = 0.5
# Relative error of sums in single precision.
_ROUNDING = 1e-5
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

    def sets_apart(self, layout: SampleLayout, n: int) -> bool:
        """Return whether each probed sample's rows hold most of its gradient, as far as is known.

        That is more than an equal share, and more than of another sample's gradient. The gradient
        of a weight, which meets no data, looks alike for all samples.
        """
        known = [weights[layout.axis] for weights in self.arrived if layout.axis in weights]
        totals = [layout.totals(weights, n) for weights in known]
        if len(totals) < len(self.probed) or not all(float(total.sum()) > 0 for total in totals):
            return True
        shares = torch.stack([total / total.sum() for total in totals])[:, list(self.probed)]
        own, largest = shares.diagonal(), shares.amax(dim=0)
        return bool((own * n > 1 + _ROUNDING).all() and (own >= largest).all())

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
    known: KnownRows,
    start: int | None = None,
) -> dict[Node, Evidence]:
    """Return the evidence about the layouts of some meetings.

    Args:
        loss: The loss of a batch; its graph is retained.
        result: A walk over its graph.
        axes: The meetings in question, by node, with the axes on which samples can lie.
        n: Number of samples.
        known: Whose rows the batch is known to have.
        start: Number of a place at which samples are known to be independent, if there is one. The
            others then count only for meetings that no gradient from there reaches.
    """
    meetings = [meeting for meeting in result.meetings if meeting.node in axes]
    best: dict[Node, Evidence] = {}
    shown: dict[Node, Evidence] = {}
    if start is not None and meetings:
        place = next(islice(starts_of(loss, result, n, known), start, None), None)
        found = _Prober(result, meetings, axes, n).evidence_from(loss, *place) if place else {}
        shown = {node: each for node, each in found.items() if not each.is_empty}
        meetings = [meeting for meeting in meetings if meeting.node not in shown]
    prober = _Prober(result, meetings, axes, n)
    n_certain = 0
    for cuts, choice in starts_of(loss, result, n, known) if meetings else ():
        evidence = prober.evidence_from(loss, cuts, choice)
        is_certain = certainty(evidence) > _CERTAIN
        n_certain += is_certain
        if is_certain and n_certain > 1:  # Some nodes depend on another part of the loss.
            best = {node: _better(each, evidence.get(node)) for node, each in best.items()}
        elif not best or certainty(evidence) > certainty(best):
            best = evidence
        # From a certain start, nothing less than all of a gradient is a proof.
        is_proven = all(each.is_empty or each.share > PROVEN for each in best.values())
        if n_certain == _MAX_CERTAIN or (n_certain and is_proven):
            break
    return best | shown


# Starts with which samples turn out to be independent, until some nodes are given up.
_MAX_CERTAIN = 4
# Median share with which samples count as independent: masked gradients are exactly zero then.
_CERTAIN = 1 - 1e-6


def certainty(evidence: Mapping[Node, Evidence]) -> float:
    """Return the median share of a probed sample's gradient in its rows."""
    shares = sorted(e.share for e in evidence.values() if not e.is_empty)
    return shares[len(shares) // 2] if shares else 0.0


def _better(first: Evidence, second: Evidence | None) -> Evidence:
    if second is None or not (first.is_empty or second.share > first.share):
        return first
    return second


# An edge, the gradient there, and where the samples lie in it.
_Start = tuple[GradientEdge, Tensor, SampleLayout | IrregularRows]


@dataclass(frozen=True)
class _Prober:
    """Probes meetings of a graph; ``axes`` are those on which samples can lie."""

    result: Walk
    meetings: Sequence[Meeting]
    axes: Mapping[Node, Sequence[int]]
    n: int

    def evidence_from(self, loss: Tensor, cuts: Cuts, choice: int) -> dict[Node, Evidence]:
        """Return the evidence of probes that start at some edges, with one of their layouts each.

        It is empty if the loss does not depend on these edges.
        """
        edges = [edge for edge, _ in cuts]
        gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        starts = [
            (edge, grad, layouts[min(choice, len(layouts) - 1)])
            for (edge, layouts), grad in zip(cuts, gradients, strict=True)
            if grad is not None
        ]
        if not starts:
            return {}
        probed = _strongest_samples(starts, self.n)
        arrived = [self._arriving(starts, sample) for sample in probed]
        return {
            meeting.node: self._evidence_of(meeting, probed, arrived) for meeting in self.meetings
        }

    def _evidence_of(
        self, meeting: Meeting, probed: list[int], arrived: Sequence[_Weights]
    ) -> Evidence:
        weights = [by_node.get(meeting.node, {}) for by_node in arrived]
        layouts = possible_layouts(meeting.shape, self.n, self.axes[meeting.node])
        shares = [(_share(each, weights, probed, self.n), each) for each in layouts]
        known = [pair for pair in shares if pair[0] == pair[0]]
        if not known:
            return Evidence(None, float("nan"), probed, weights)
        share, layout = max(known, key=lambda pair: pair[0])
        return Evidence(layout, share, probed, weights)

    def _arriving(self, starts: Sequence[_Start], sample: int) -> _Weights:
        """Return a sample's squared gradient that arrives in each meeting, per entry of an axis."""
        weights: dict[Node, dict[int, Tensor]] = {}

        def keep(node: Node, grads: Sequence[Tensor | None]) -> None:
            grad = grads[0]
            if grad is not None:
                axes = [axis for axis in self.axes[node] if axis < grad.ndim]
                weights[node] = {axis: _squares_along(grad, axis) for axis in axes}

        masked = []
        for _, grad, layout in starts:
            entries = layout.entries_of(grad.shape[layout.axis], self.n, sample).to(grad.device)
            part = grad.index_select(layout.axis, entries)
            masked.append(torch.zeros_like(grad).index_copy(layout.axis, entries, part))
        edges = [edge for edge, _, _ in starts]
        backward_to_meetings(edges, masked, self.result, self.meetings, keep)
        return {
            node: {axis: values.cpu() for axis, values in by_axis.items()}
            for node, by_axis in weights.items()
        }


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
        total += layout.totals(_squares_along(grad, layout.axis), n).cpu()
    total[0] = -1 if n > 2 else total[0]
    return total.topk(min(2, n)).indices.tolist()


def _squares_along(grad: Tensor, axis: int) -> Tensor:
    """Return the sum of squares per entry of an axis."""
    squares = in_double_precision(grad.detach().abs()).square()
    others = [other for other in range(grad.ndim) if other != axis]
    return squares.sum(dim=others) if others else squares


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
