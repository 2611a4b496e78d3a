"""Places in a loss's graph at which a probe can send back the gradient of one sample alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.graph.sample_layout import SampleLayout, possible_layouts
from tda_lightning.gradients.graph.walk import Node, Walk, output_shape

# Edges of the graph, each with the layouts that its shape allows.
Cuts = list[tuple[GradientEdge, list[SampleLayout]]]
# Places at which probes start, from the loss on, until one explains the gradients.
_MAX_CUTS = 12


def starts_of(loss: Tensor, result: Walk, n: int) -> Iterator[tuple[Cuts, int]]:
    """Yield places at which probes can start, each with the number of a layout there.

    An axis of exactly ``n`` entries is most likely the samples'. The loss may mix samples, as
    contrastive losses do, so starts behind its first operations follow.
    """
    cuts = _cuts({loss.grad_fn}, result, n, is_exact=True)
    for _ in range(1 if result.has_batch_statistics else _MAX_CUTS):
        yield from ((cuts, choice) for choice in _choices(cuts))
        cuts = _cuts({edge.node for edge, _ in cuts}, result, n, is_exact=True)
    cuts = _cuts({loss.grad_fn}, result, n, is_exact=False)
    choices = _choices(cuts)
    # Twice as many rows as samples, and nowhere n: two views, one below the other.
    are_views = all(output_shape((e.node, e.output_nr))[0] == 2 * n for e, _ in cuts)
    yield from ((cuts, choice) for choice in (reversed(choices) if are_views else choices))


def _choices(cuts: Cuts) -> range:
    return range(min(2, max((len(layouts) for _, layouts in cuts), default=0)))


def _cuts(roots: set[Node], result: Walk, n: int, *, is_exact: bool) -> Cuts:
    """Return the first edges behind some nodes that have samples, with the layouts they allow.

    With ``is_exact``, the axis of the samples must have exactly ``n`` entries.
    """
    waiting, seen = list(roots), set(roots)
    cuts: Cuts = []
    # What arrives at its own start proves nothing.
    uncertain = {m.node for m in result.meetings if m.is_first and not m.takes_data}
    while waiting:
        node = waiting.pop()
        for child, number in node.next_functions:
            if child not in result.with_samples or child in uncertain:
                continue
            shape = output_shape((child, number))
            layouts = [
                layout
                for layout in possible_layouts(shape, n, (0, 1))
                if not is_exact or shape[layout.axis] == n
            ]
            edge = GradientEdge(child, number)
            if layouts:
                if all(edge != other for other, _ in cuts):
                    cuts.append((edge, layouts))
            elif child not in seen:
                seen.add(child)
                waiting.append(child)
    return cuts


# Axes of a node's output that may be the samples': `(n, ...)`, `(s, n, d)` and the like.
_MAX_AXES = 3


def joined_rows(with_samples: Iterable[Node], n: int) -> int:
    """Return the number of rows of each sample, if no operation shows the samples on an axis.

    Then nothing but the order of the rows shows whose they are.

    Args:
        with_samples: The nodes of a graph whose outputs depend on samples.
        n: Number of samples.

    Returns:
        The largest number of rows per sample; 0 if some output has an axis of ``n`` entries.
    """
    shapes = [shape for node in with_samples if (shape := output_shape((node, 0)))]
    if n <= 1 or any(n in shape[:_MAX_AXES] for shape in shapes):
        return 0
    return max((shape[0] // n for shape in shapes if shape[0] % n == 0), default=0)
