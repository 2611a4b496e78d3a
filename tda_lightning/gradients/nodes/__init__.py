"""Nodes: one rule per kind of autograd node in which parameters meet data.

No other package distinguishes operations.
"""

# Rules are registered when their modules are imported.
from tda_lightning.gradients.nodes import convolution, elementwise, linear, lookup, norms, recurrent
from tda_lightning.gradients.nodes.rule import Contribution, NodeCall, NodeRule, node_rule, rule_for

__all__ = [
    "Contribution",
    "NodeCall",
    "NodeRule",
    "convolution",
    "elementwise",
    "linear",
    "lookup",
    "node_rule",
    "norms",
    "recurrent",
    "rule_for",
]
