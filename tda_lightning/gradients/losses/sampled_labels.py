r"""Sampled labels: at which steps they are drawn, with which weight, and their gradients.

The curvature of a step's batch, :math:`H_t`, costs one more backward pass. With a share
:math:`p < 1`, only some steps pay for it. A step that is drawn stands for :math:`1 / p` steps:

.. math:: \hat H_t = \frac{m_t}{p} H_t, \qquad m_t \in \{0, 1\}, \qquad \mathbb{E}[m_t] = p

so that sums over steps are unbiased. Draws are systematic within blocks of about :math:`1 / p`
steps, with a random start for each block. So they are spread evenly over the training, and do not
follow a period of the data. Which steps are drawn depends on their numbers alone: a resumed
training draws the same ones, and so do all processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tda_lightning.gradients.losses.loss_graph import term_weights
from tda_lightning.gradients.losses.loss_nodes import LossNode
from tda_lightning.stores.step import FIRST_LABELLED_STEPS


@dataclass(frozen=True)
class LabelSchedule:
    """Draws the steps at which labels are sampled.

    Attributes:
        share: Share of the steps after the first :data:`FIRST_LABELLED_STEPS`, which are all drawn.
    """

    share: float

    def weight(self, number: int) -> float:
        """Return the weight of the curvature of a recorded step, 0 if no labels are sampled.

        Args:
            number: Number of steps recorded before.

        >>> [LabelSchedule(0.25).weight(number) for number in range(19, 28)]
        [1.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]
        """
        if number < FIRST_LABELLED_STEPS:
            return 1.0
        p = self.share
        block, place = divmod(number - FIRST_LABELLED_STEPS, max(1, round(1 / p)))
        start = Random(block).random()
        is_drawn = math.floor(start + (place + 1) * p) > math.floor(start + place * p)
        return is_drawn / p

    def mean_share(self, steps: float) -> float:
        """Return the expected share of a training's recorded steps at which labels are sampled.

        Args:
            steps: Number of recorded steps, which may be infinite.
        """
        complete = FIRST_LABELLED_STEPS / max(steps, FIRST_LABELLED_STEPS)
        return complete + (1 - complete) * self.share


class UnsampledLossError(ValueError):
    """Labels cannot be sampled for a loss."""


def sampled_gradients(
    loss: Tensor, nodes: Sequence[LossNode], generator: Generator
) -> list[tuple[GradientEdge, Tensor]]:
    """Sample labels, and return gradients whose outer products average to the loss's Hessian.

    Args:
        loss: The loss of a batch, with its graph.
        nodes: Its loss functions.
        generator: Generator of the samples.

    Returns:
        Edges of the model's outputs in the graph, each with a gradient. It is the sum over terms of
        the gradient for a sampled label times the square root of the term's weight in ``loss``.
    """
    weights = term_weights(loss, nodes) if nodes else []
    with torch.no_grad():
        return [
            (node.outputs, node.sample(generator) * weight.clamp_min(0).sqrt())
            for node, weight in zip(nodes, weights, strict=True)
            if weight is not None
        ]


def label_gradients(
    model: nn.Module, loss: Tensor, nodes: Sequence[LossNode], generator: Generator
) -> list[tuple[GradientEdge, Tensor]]:
    """Return the gradients of a loss of any model, as :func:`sampled_gradients` do.

    Args:
        model: The model; its method ``sampled_output_gradients(loss, generator)`` takes precedence.
        loss: The loss of a batch, with its graph.
        nodes: Its loss functions.
        generator: Generator of the samples.

    Raises:
        UnsampledLossError: If labels cannot be sampled for the loss.
    """
    sample = getattr(model, "sampled_output_gradients", None)
    if sample is not None:
        return [(get_gradient_edge(outputs), grad) for outputs, grad in sample(loss, generator)]
    gradients = sampled_gradients(loss, nodes, generator)
    if not gradients:
        raise UnsampledLossError(
            f"Labels cannot be sampled for the loss of `{type(model).__name__}."
            "training_step`: expected cross-entropy, binary cross-entropy, squared error, "
            "Huber's loss, or a method `sampled_output_gradients(loss, generator)` of the "
            "model. Write that method, or do without it: record with `curvature='none'`, and solve "
            "for full gradients with `ConjugateGradient()` and `curvature=Hessian()`."
        )
    return gradients
