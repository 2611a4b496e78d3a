"""Trace whose row it is: send back a gradient of another size for each sample.

A backward pass is linear: where a row depends on one sample alone, a factor on the gradient of that
sample's outputs multiplies the row too. So two passes, with and without factors, show its sample.

A batch norm mixes the rows of a batch. It maps rows to rows, so the trace stops in front of it and
goes on behind it with another gradient for the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import BATCH_NORMS, Node, Walk, output_shape
from tda_lightning.stores.precision import widest_format

# Edges of the graph, each with the layouts that its shape allows.
Cuts = list[tuple[GradientEdge, list[SampleLayout | IrregularRows]]]
# Some of them, and the number of a layout there.
Place = tuple[Cuts, int]
# The share of a sample's gradient that its rows must hold, where samples are independent.
PROVEN = 0.999


@dataclass(frozen=True)
class Trace:
    """Whose rows arrive in a node.

    Attributes:
        rows: The sample of each row; the first one for rows without a gradient.
        share: The share of the squared gradient in rows that depend on one sample alone; NaN if
            no gradient arrived, or none but rounding errors.
        is_certain: The rows that depend on one sample alone.
        squares: The squared gradient of each row.
        blurred: The share of the squared gradient that rounding may give to other samples.
    """

    rows: IrregularRows
    share: Float[Tensor, ""]
    is_certain: Bool[Tensor, " rows"]
    squares: Float[Tensor, " rows"]
    blurred: float

    def agrees(self, owners: Int[Tensor, " rows"]) -> bool:
        """Return whether the certain rows belong to the given samples, except for rounding."""
        traced = self.rows.of_rows
        certain = torch.where(self.is_certain, self.squares, 0)
        differing = certain[owners.to(traced.device) != traced].sum()
        return float(differing) <= self.blurred * float(certain.sum())


@dataclass(frozen=True)
class _Grid:
    """Factors ``2 ** (number / steps)`` for numbers from ``-half`` to ``half - 1``.

    Attributes:
        half: Half the number of factors.
        steps: Factors per power of two.
        tolerance: Largest distance of a single sample's factor from its number.
        negligible: Share of a row's squared gradient below which rounding hides the factor.
        blurred: As in :class:`Trace`.
    """

    half: int
    steps: int
    tolerance: float
    negligible: float
    blurred: float

    def digits(self, n: int) -> int:
        """Return the number of passes that ``n`` samples need."""
        count = 1
        while (2 * self.half) ** count < n:
            count += 1
        return count

    def factors(self, owners: Int[Tensor, " rows"], digit: int) -> Float[Tensor, " rows"]:
        """Return the factor of each row in the pass of a digit."""
        number = owners // (2 * self.half) ** digit % (2 * self.half) - self.half
        return torch.exp2(number.to(widest_format(number.device)) / self.steps)

    def numbers(self, scaled: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
        """Return the digit between two squared norms, and whether it is one sample's."""
        exact = torch.log2(scaled / plain) * (self.steps / 2)
        number = exact.nan_to_num(0.0, 0.0, 0.0).round()
        is_single = ((exact - number).abs() < self.tolerance) & (number.abs() <= self.half)
        return number.long() + self.half, is_single


_FINE = _Grid(512, 16, 0.005, 1e-6, 0.0)
# Gradients in half precision have two digits, and float16 has few powers of two.
_COARSE = {
    torch.float16: _Grid(8, 2, 0.15, 0.05, 0.02),
    torch.bfloat16: _Grid(64, 2, 0.15, 0.05, 0.02),
}


# Share of the gradient in rows of single samples behind which a trace goes on.
_MIN_SHARE = 0.5
# The columns of a row in as many groups: by chance, the factor of one may look like a sample's.
_GROUPS = 3


@dataclass(frozen=True)
class _Start:
    """An edge at which a pass starts, where the samples lie there, and which rows are known."""

    edge: GradientEdge
    layout: SampleLayout | IrregularRows
    seed: int
    is_known: Bool[Tensor, " rows"] | None = None

    def gradient(self, factors: Callable[[Tensor], Tensor] | None, n: int) -> Tensor:
        """Return a random gradient, multiplied by the factors of the rows' owners."""
        about = self.edge.node._input_metadata[self.edge.output_nr]
        # A generator apart: the training's random numbers stay as they are.
        generator = torch.Generator(about.device).manual_seed(self.seed)
        shape, axis = tuple(about.shape), self.layout.axis
        values = torch.randn(shape, generator=generator, device=about.device)
        ones = [1] * (len(shape) - axis - 1)
        if self.is_known is not None:
            values = values * self.is_known.reshape(-1, *ones)
        if factors is not None:
            owners = self.layout.owners(shape[axis], n).to(about.device)
            values = values * factors(owners).reshape(-1, *ones)
        return values.to(about.dtype)


def trace(
    place: Place, result: Walk, wanted: Set[Node], n: int, known: KnownRows, seed: int = 0
) -> dict[Node, Trace]:
    """Return whose rows arrive in some nodes; nodes that no gradient reaches are missing.

    Args:
        place: Where the samples' rows are known, as from :func:`.starts_of`.
        result: A walk over the graph, which is retained.
        wanted: The nodes.
        n: Number of samples.
        known: Whose rows the batch is known to have.
        seed: Seed of the random gradients.
    """
    cuts, choice = place
    starts = [_Start(edge, layouts[min(choice, len(layouts) - 1)], seed) for edge, layouts in cuts]
    formats = {node._input_metadata[0].dtype for node in wanted}
    grid = next((grid for dtype, grid in _COARSE.items() if dtype in formats), _FINE)
    traces: dict[Node, Trace] = {}
    while starts:
        section = _Section.behind(starts, result, wanted, known)
        plain = section.squares(starts, None, n)
        factors = [partial(grid.factors, digit=digit) for digit in range(grid.digits(n))]
        scaled = [section.squares(starts, each, n) for each in factors]
        floors = _floors(plain)
        new: dict[Node, Trace] = {}
        for node in [each for each in plain if each not in traces]:
            axis, passes = known.axis(output_shape((node, 0))), [each[node] for each in scaled]
            new[node] = _trace_of(axis, plain[node], passes, grid, n, floors[node])
        traces |= new
        starts = [
            _Start(GradientEdge(*node.next_functions[0]), rows.rows, seed, rows.is_certain)
            for node, rows in ((node, new.get(node)) for node in section.norms)
            if rows is not None
            and float(rows.share) > _MIN_SHARE
            and node.next_functions[0][0] in result.with_samples
        ]
    return {node: each for node, each in traces.items() if node in wanted}


# Rounding errors of gradients that cancel, relative to the largest gradient of a pass.
_MAX_ROUNDING = 1e-5


def _floors(plain: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
    """Return the squared gradient below which a row may hold rounding errors alone."""
    rows = [squares.sum(dim=1) for squares in plain.values() if len(squares)]
    largest = torch.cat(rows).max() if rows else torch.zeros(())
    return {
        node: largest * min(16 * torch.finfo(node._input_metadata[0].dtype).eps, _MAX_ROUNDING) ** 2
        for node in plain
    }


def _trace_of(
    axis: int, plain: Tensor, scaled: Sequence[Tensor], grid: _Grid, n: int, floor: Tensor
) -> Trace:
    """Read the owners of rows off the squared gradients ``(rows, groups)`` of some passes.

    Rows below the floor may hold rounding errors, as where a softmax cancels what is added to all
    its inputs. They disprove nothing.
    """
    by_row = plain.sum(dim=1)
    owners = torch.zeros_like(by_row, dtype=torch.int64)
    is_single = has_gradient = by_row > 0
    shows_nothing = plain <= grid.negligible * by_row[:, None]
    largest = plain.argmax(dim=1, keepdim=True)
    for digit, squares in enumerate(scaled):
        numbers, is_certain = grid.numbers(squares, plain)
        number = numbers.gather(1, largest)
        agrees = (is_certain & (numbers == number)) | shows_nothing
        owners += number[:, 0] * (2 * grid.half) ** digit
        is_single = is_single & agrees.all(dim=1)
    # A row that rounding has blurred most likely belongs to the sample with the nearest factor.
    is_possible = has_gradient & (owners >= 0) & (owners < n)
    is_single &= is_possible
    rows = IrregularRows(torch.where(is_possible, owners, 0), n, axis, is_possible)
    share = by_row[is_single].sum() / by_row[is_single | (by_row > floor)].sum()
    return Trace(rows, share, is_single, by_row, grid.blurred)


@dataclass
class _Section:
    """The part of a graph between some edges and the next batch norms.

    ``inner`` are the nodes to observe within it. Behind ``firsts`` there are no samples.
    """

    known: KnownRows
    inner: list[Node] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    firsts: list[Node] = field(default_factory=list)

    @classmethod
    def behind(
        cls, starts: Sequence[_Start], result: Walk, wanted: Set[Node], known: KnownRows
    ) -> _Section:
        """Find the section behind some edges."""
        section = cls(known)
        firsts = {meeting.node for meeting in result.meetings if meeting.is_first}
        waiting: list[Node] = [start.edge.node for start in starts]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if type(node).__name__ in BATCH_NORMS and output_shape((node, 0))[0] > 1:
                section.norms.append(node)
                continue
            if node in firsts:
                section.firsts.append(node)
            elif node in wanted:
                section.inner.append(node)
            for child, _ in node.next_functions:
                if child in result.with_samples and child not in seen:
                    seen.add(child)
                    waiting.append(child)
        return section

    def squares(
        self, starts: Sequence[_Start], factors: Callable[[Tensor], Tensor] | None, n: int
    ) -> dict[Node, Float[Tensor, "rows groups"]]:
        """Return the squared gradient of each row that arrives in a node, per group of columns."""
        squares: dict[Node, Tensor] = {}

        def keep(node: Node, grad: Tensor | None) -> None:
            if grad is not None and grad.ndim:
                values = grad.detach().abs().to(widest_format(grad.device)).square()
                values = values.movedim(self.known.axis(grad.shape), 0)
                rows = values.flatten(1) if values.ndim > 1 else values[:, None]
                squares[node] = torch.stack(
                    [rows[:, number::_GROUPS].sum(dim=1) for number in range(_GROUPS)], dim=1
                )

        ends = [
            GradientEdge(node, number)
            for node in (*self.norms, *self.firsts)
            for number in range(len(node._input_metadata))
        ]
        if not ends:
            return squares
        handles = [
            node.register_prehook(lambda grads, node=node: keep(node, grads[0]))
            for node in self.inner
        ]
        # What a norm would mix must not arrive behind it.
        handles += [node.register_prehook(_zeros) for node in self.norms]
        gradients = [start.gradient(factors, n) for start in starts]
        try:
            arrived = torch.autograd.grad(
                [start.edge for start in starts],
                ends,
                gradients,
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        for edge, grad in zip(ends, arrived, strict=True):
            if edge.output_nr == 0:
                keep(edge.node, grad)
        return squares


def _zeros(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in grads)
