r"""Losses: what a model's loss is made of, how curved it is, and labels of the model's own.

A loss is a weighted sum of terms (samples, tokens, outputs). Where a term is the negative
log-likelihood of a label under a distribution that the model predicts, labels :math:`\hat y` drawn
from that distribution give gradients :math:`\hat g` at the model's outputs with
:math:`E\,\hat g \hat g^\top = A`, the Hessian of the term there (Martens 2020, "New Insights and
Perspectives on the Natural Gradient Method", section 5). Pulled back through the model they are
rows of the Gauss-Newton matrix.

The terms are found on the graph of the loss, whatever function made it: cross-entropy is anything
that is linear in a log-softmax. Nothing is watched while the model runs, no random number of the
user's is drawn, and the graph is kept.
"""

from tda_lightning.gradients.losses.graph import (
    find_losses,
    find_losses_and_penalties,
    sampled_gradients,
    term_weights,
)
from tda_lightning.gradients.losses.loss_nodes import LossNode
from tda_lightning.gradients.losses.summary import LossSummary

__all__ = [
    "LossNode",
    "LossSummary",
    "find_losses",
    "find_losses_and_penalties",
    "sampled_gradients",
    "term_weights",
]
