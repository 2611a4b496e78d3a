"""Step: what one optimizer step leaves behind.

A step holds one *visit* per sample that took part in it: the sample's id, its weight in the loss,
and its sketch row. Rows are as-applied contributions: together they sum to the sketch of the
gradient that the optimizer used. What is known of the loss's curvature stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ParameterGroup:
    """Hyper-parameters of one optimizer parameter group, as one step used them.

    Attributes:
        lr: Learning rate, read before any scheduler moved it.
        weight_decay: Coefficient of the weight decay, coupled or decoupled as the optimizer has it.
        momentum: Momentum of SGD-like optimizers, else 0.
        dampening: Dampening of SGD-like optimizers, else 0.
        beta1: First-moment decay of Adam-like optimizers, else 0.
        beta2: Second-moment decay of Adam-like optimizers, else 0.
        eps: Term added to the denominator by Adam-like optimizers, else 0.
        nesterov: 1 for Nesterov momentum, else 0.
        share: Share of all recorded parameters, whoever trains them, that the group holds; 0 in
            every group of a step where it is not known.
        decoupled: 1 if the optimizer was told to decouple its weight decay, else 0: then its name
            tells.
        descent: 1 if its steps are known to be gradient steps in the coordinates of the rows, else
            0: then the optimizer's name tells.
        owner: Tells the optimizers of a training apart: the number of the first recorded block that
            the group's optimizer trains; 0 as well where it is not known.
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
    """How much of what a step really did its recorded rows explain; squared norms, in the sketch.

    Attributes:
        gradient: Of each block's gradient, shape ``(blocks,)``.
        deviation: Of what is between that gradient and the sum of the rows, shape ``(blocks,)``.
        left_out: Of the gradient of all parameters that are not recorded.
        update: Share of the recorded parameters' update that lies along the sum of the rows, from 0
            to 1: 1 for plain SGD, less the more momentum, weight decay and preconditioning do.
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
    r"""What rows are multiplied by before they are sketched: the coordinates of an optimizer.

    Entry :math:`(i, j)` of a block's gradient matrix is multiplied by ``rows[i] * columns[j]`` of
    that block. An Adam-like optimizer moves along :math:`P g` with a diagonal :math:`P`; in the
    coordinates :math:`P^{1/2} g` it is plain gradient descent, and inner products of rows are
    :math:`\langle g, P g' \rangle`.

    Attributes:
        rows: Factors of the rows of every block, one block after the other.
        columns: Factors of the columns of every block, one block after the other.
    """

    rows: Float[Tensor, " all_rows"]
    columns: Float[Tensor, " all_columns"]


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """One optimizer step and the visits that made it, without their rows.

    Attributes:
        index: Number of optimizer steps taken before this one.
        epoch: Epoch in which the step was taken.
        optimizer: Class name of the optimizer.
        groups: Hyper-parameters of each parameter group.
        sample_ids: Which training sample each visit was, shape ``(n,)``.
        weights: Weight of each visit in the step's loss, 1/n for a mean, shape ``(n,)``.
        audit: What an audit of this step found, if there was one.
        terms: Number of loss terms (tokens, say) that each visit's loss is the mean of, if known,
            shape ``(n,)``.
        curvature: What makes ``row row^T / weight * terms`` as large as the curvature of the
            visit's loss: p / (1 - p) of the label for cross-entropy, 1 / (2 r^2) of the residual
            for squared error, if known; shape ``(n,)``.
        preconditioner: The coordinates of this step's rows and of those to come, if they change
            with it.
        loss: What the loss is called (``"cross-entropy"``, ``"squared error"``), if known.
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
    preconditioner: Preconditioner | None = None
    loss: str = ""

    @property
    def lr(self) -> float:
        """Learning rate of the step: the largest; the rows' coordinates are relative to it."""
        return max(group.lr for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class Step(StepFacts):
    """One optimizer step, the visits that made it, and their rows.

    Attributes:
        sketch: One row per visit, shape ``(n, k)``.
        curvature_rows: Rows from labels drawn from the model's own predictions, scaled so that
            their outer products sum, on average, to the Gauss-Newton matrix of the step's loss, if
            recorded; shape ``(m, k)``.
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
        """Put rows to the facts of a step."""
        return cls(**vars(facts), sketch=sketch, curvature_rows=curvature_rows)
