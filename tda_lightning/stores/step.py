"""Step: the record of one optimizer step.

A step holds one *visit* per sample in its batch: the sample's id, its weight in the loss, and its
sketch row. Rows are as-applied contributions: they sum to the sketch of the gradient that the
optimizer used. A step may also hold the curvature of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ParameterGroup:
    """Hyper-parameters of one optimizer parameter group in one step.

    Attributes:
        lr: Learning rate, read before any scheduler changes it.
        weight_decay: Coefficient of the weight decay, coupled or decoupled.
        momentum: Momentum of SGD-like optimizers, else 0.
        dampening: Dampening of SGD-like optimizers, else 0.
        beta1: First-moment decay of Adam-like optimizers, else 0.
        beta2: Second-moment decay of Adam-like optimizers, else 0.
        eps: Term added to the denominator by Adam-like optimizers, else 0.
        nesterov: 1 for Nesterov momentum, else 0.
        share: Fraction of all recorded parameters, over all optimizers, that are in this group; 0
            in every group of a step if unknown.
        decoupled: 1 if the optimizer is configured to decouple its weight decay; if 0, the
            optimizer's name decides.
        descent: 1 if its steps are known to be gradient steps in the coordinates of the rows; if
            0, the optimizer's name decides.
        owner: Identifies the group's optimizer among several: the number of the first recorded
            block that it trains. Also 0 if unknown.
    """

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: float = 0.0
    share: float = 0.0
    decoupled: float = 0.0
    descent: float = 0.0
    owner: float = 0.0


@dataclass(frozen=True)
class Audit:
    """How well the rows of a step explain its gradient and its update.

    The norms are those of sketches.

    Attributes:
        gradient: Squared norm of each block's gradient, shape ``(blocks,)``.
        deviation: Squared norm of that gradient minus the sum of the rows, shape ``(blocks,)``.
        left_out: Squared norm of the gradient of all parameters that are not recorded.
        update: Share of the recorded parameters' update along the sum of the rows, from 0 to 1. It
            is 1 for plain SGD; momentum, weight decay and preconditioning lower it.
    """

    gradient: Float[Tensor, " blocks"]
    deviation: Float[Tensor, " blocks"]
    left_out: float
    update: float

    def explained(self) -> Float[Tensor, " blocks"]:
        """Return the share of each block's gradient that the rows explain, at most 1."""
        return 1 - self.deviation / self.gradient.clamp_min(1e-30)

    def explained_in_all(self) -> float:
        """Return the share of the gradient of all trained parameters that the rows explain."""
        gradient = float(self.gradient.sum())
        return (gradient - float(self.deviation.sum())) / max(gradient + self.left_out, 1e-30)


@dataclass(frozen=True)
class Preconditioner:
    r"""Factors that rows are multiplied by before sketching: the coordinates of an optimizer.

    Entry :math:`(i, j)` of a block's gradient matrix is multiplied by ``rows[i] * columns[j]`` of
    that block. An Adam-like optimizer moves along :math:`P g` with a diagonal :math:`P`; in the
    coordinates :math:`P^{1/2} g` it is plain gradient descent, and inner products of rows are
    :math:`\langle g, P g' \rangle`.

    Attributes:
        rows: Factors of the rows of all blocks, concatenated.
        columns: Factors of the columns of all blocks, concatenated.
    """

    rows: Float[Tensor, " all_rows"]
    columns: Float[Tensor, " all_columns"]


# If labels are sampled at all, then in all of these first steps, whatever their share later:
# curvature changes fastest there, and short runs consist of them.
FIRST_LABELLED_STEPS = 20

# The facts of visits that may be unknown.
OPTIONAL_FACTS = ("terms", "curvature", "trace_ratio", "losses", "errors", "margins")


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """One optimizer step and its visits, without their rows.

    Attributes:
        index: Number of optimizer steps taken before this one.
        epoch: Epoch of the step.
        optimizer: Class name of the optimizer.
        groups: Hyper-parameters of each parameter group.
        sample_ids: Id of each visit's training sample, shape ``(n,)``.
        weights: Weight of each visit in the step's loss, 1/n for a mean, shape ``(n,)``.
        audit: Result of the audit of this step, if it was audited.
        terms: Number of loss terms, such as tokens, that each visit's loss averages, if known;
            shape ``(n,)``.
        curvature: Factor that scales ``row row^T / weight * terms`` to the curvature of the
            visit's loss, if known; shape ``(n,)``. It is p / (1 - p) for cross-entropy with label
            probability p, and 1 / (2 r^2) for squared error with residual r.
        trace_ratio: The same factor with all classes: trace of the Hessian of the visit's loss with
            respect to the outputs, over the squared norm of the gradient there, if known; shape
            ``(n,)``. It is ``(1 - |p|^2) / |p - e|^2`` for cross-entropy with probabilities p and a
            label of unit vector e. For losses of one output, it equals `curvature`.
        losses: Loss of each visit before the step, the mean of its terms, if known; shape ``(n,)``.
            It is NaN if none of its terms has a weight.
        errors: Norm of the predicted probabilities minus the label, if the loss is a cross-entropy
            with one term per visit; shape ``(n,)``.
        margins: Logit of the label minus the highest other logit, likewise; shape ``(n,)``. It is
            positive if the label was predicted.
        preconditioner: New coordinates of the rows, from this step on; ``None`` if unchanged.
        loss: Name of the loss (``"cross-entropy"``, ``"squared error"``), if known.
    """

    index: int
    epoch: int
    optimizer: str
    groups: tuple[ParameterGroup, ...]
    sample_ids: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]
    audit: Audit | None = None
    terms: Float[Tensor, " n"] | None = None
    curvature: Float[Tensor, " n"] | None = None
    trace_ratio: Float[Tensor, " n"] | None = None
    losses: Float[Tensor, " n"] | None = None
    errors: Float[Tensor, " n"] | None = None
    margins: Float[Tensor, " n"] | None = None
    preconditioner: Preconditioner | None = None
    loss: str = ""

    @property
    def lr(self) -> float:
        """Largest learning rate of the groups; the rows' coordinates are relative to it."""
        return max(group.lr for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class Step(StepFacts):
    """One optimizer step with its visits and their rows.

    Attributes:
        sketch: One row per visit, shape ``(n, k)``.
        curvature_rows: Rows for labels sampled from the model's predictions, shape ``(m, k)``;
            ``None`` in a run without them. The expected sum of their outer products is the
            Gauss-Newton matrix of the step's loss. In a run that samples labels at a share of the
            steps, the other steps have no rows, ``m = 0``, and the rows are scaled to make up for
            them: the expectation is over the drawn steps too.
    """

    sketch: Float[Tensor, "n k"]
    curvature_rows: Float[Tensor, "m k"] | None = None

    @classmethod
    def of(
        cls,
        facts: StepFacts,
        sketch: Float[Tensor, "n k"],
        curvature_rows: Float[Tensor, "m k"] | None,
    ) -> Step:
        """Combine the facts of a step with its rows."""
        return cls(**vars(facts), sketch=sketch, curvature_rows=curvature_rows)

    def with_curvature(self) -> Step:
        """Return the step of a run with sampled labels, with no rows if it was not drawn."""
        rows = self.sketch[:0] if self.curvature_rows is None else self.curvature_rows
        return replace(self, curvature_rows=rows)

    def non_finite_visits(self) -> Int[Tensor, " m"]:
        """Return the positions of the visits whose rows hold NaN or infinity."""
        # A sum is finite only if its terms are, and takes a fraction of the time.
        if isfinite(self.sketch.sum()):
            return torch.empty(0, dtype=torch.int64)
        return (~self.sketch.isfinite().all(dim=1)).nonzero()[:, 0].cpu()
