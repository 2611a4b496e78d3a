r"""Losses: the terms of a loss, their curvature, and labels sampled from the model's predictions.

A loss is a weighted sum of terms (samples, tokens, outputs). Let a term be the negative
log-likelihood of a label under a distribution that the model predicts. Labels :math:`\hat y` drawn
from that distribution give gradients :math:`\hat g` at the model's outputs with
:math:`E\,\hat g \hat g^\top = A`, the Hessian of the term there. See Martens (2020), "New Insights
and Perspectives on the Natural Gradient Method", section 5. Pulled back through the model, these
gradients are rows of the Gauss-Newton matrix.

The terms are found on the autograd graph of the loss, by whichever functions it was computed.
Anything linear in a log-softmax counts as cross-entropy. The forward pass needs no hooks, the
global random state is unchanged, and the graph is retained.
"""

from tda_lightning.gradients.losses.deferred_summary import DeferredSummary, facts_of
from tda_lightning.gradients.losses.loss_graph import (
    LossFacts,
    find_losses,
    find_losses_and_penalties,
    term_weights,
)
from tda_lightning.gradients.losses.loss_nodes import LossNode
from tda_lightning.gradients.losses.reduction import (
    Reduction,
    compares_all_pairs,
    mixes_samples,
    reduction_of,
)
from tda_lightning.gradients.losses.sampled_labels import (
    LabelSchedule,
    UnsampledLossError,
    label_gradients,
    sampled_gradients,
)

__all__ = [
    "DeferredSummary",
    "LabelSchedule",
    "LossFacts",
    "LossNode",
    "Reduction",
    "UnsampledLossError",
    "compares_all_pairs",
    "facts_of",
    "find_losses",
    "find_losses_and_penalties",
    "label_gradients",
    "mixes_samples",
    "reduction_of",
    "sampled_gradients",
    "term_weights",
]
