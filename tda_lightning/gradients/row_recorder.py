"""RowRecorder: turn a model's forward and backward pass over a batch into sketch rows.

Training and queries use this same code under the same recipe, so their rows are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tda_lightning.gradients.capture import Capture, recordable
from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.losses import LossNode, LossSummary, find_losses, sampled_gradients
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.stores.recipe import SampleAxis
from tda_lightning.stores.step import Preconditioner


@dataclass(frozen=True)
class BatchRows:
    """What was recorded of a batch.

    Attributes:
        rows: What each sample added to the gradient of the loss, shape ``(n, k)``.
        terms: Number of loss terms that each sample's loss is the mean of, if known.
        spread: Trace of each sample's Hessian at the outputs over its squared gradient there, both
            as they are weighted in the loss of the batch, if known.
        curvature_rows: Rows from labels of the model's own, if asked for; their outer products sum,
            on average, to the Gauss-Newton matrix of the loss.
        loss: What the loss is called, if known.
    """

    rows: Float[Tensor, "n k"]
    terms: Float[Tensor, " n"] | None
    spread: Float[Tensor, " n"] | None
    curvature_rows: Float[Tensor, "m k"] | None
    loss: str = ""

    def curvature(self, weight: float) -> Float[Tensor, " n"] | None:
        """Return each visit's curvature as a :class:`Step` holds it, if known.

        Args:
            weight: Weight of each sample's loss in the loss of the batch.
        """
        if self.spread is None or self.terms is None:
            return None
        return weight * self.spread / self.terms


class RowRecorder:
    """Record batch by batch.

    The order is :meth:`start`, forward, :meth:`start_backward`, backward, :meth:`end_backward`.

    A context manager, whose hooks are attached inside. The model's parameters are left alone.

    Args:
        model: The module to record.
        selection: What of it is recorded.
        batch_dims: Axis of the samples in layers whose names match a pattern, where not the first.
        projector: What to sketch their gradients with.
        dtype: Number format of the rows.
        sampled: Share of each batch of which rows from sampled labels are recorded too.
        passes: Whether several backward passes may go through one graph.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        batch_dims: Mapping[str, SampleAxis],
        projector: Projector,
        dtype: torch.dtype,
        sampled: float = 0.0,
        passes: Literal["one", "several"] = "one",
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._sampled = sampled
        self._generator = torch.Generator(device)
        self._selection = selection
        self._sketcher: Sketcher = projector.bind(selection.blocks, device, dtype)
        self._attached = ExitStack()
        self._capture = Capture(selection.sources, batch_dims, passes)
        self._summary: LossSummary | None = None
        self._preconditioner: Preconditioner | None = None
        self._curvature_rows: Tensor | None = None
        self._rows = self._sketcher.empty_rows(0)
        self._sums: Tensor | None = None

    @property
    def dimension(self) -> int:
        """Length ``k`` of a row."""
        return self._sketcher.dimension

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Number of a row's columns that belong to each block, or ``None`` if they share them."""
        return self._sketcher.widths

    def __enter__(self) -> RowRecorder:
        """Attach the hooks."""
        self._attached.enter_context(recordable(self._model))
        self._attached.enter_context(self._capture)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove the hooks."""
        self._attached.close()

    def start(self, n: int) -> None:
        """Expect a forward pass over ``n`` samples."""
        self._capture.start(n)
        self._expect_backward(n)

    def go_on(self) -> None:
        """Expect another backward pass of that batch, through the graph of the last one or not."""
        n = len(self._rows)
        self._capture.go_on(n)
        self._expect_backward(n)

    def _expect_backward(self, n: int) -> None:
        self._rows = self._sketcher.empty_rows(n)
        self._summary = self._curvature_rows = None

    def start_backward(self, loss: Tensor) -> None:
        """Expect the backward pass of that batch's loss."""
        self._summary = LossSummary(self._end_forward(loss), len(self._rows))
        self._capture.start_backward(self._receive)

    def extra_backward(self, loss: Tensor, trained: Sequence[nn.Parameter]) -> None:
        """Do all that recording the backward pass of that loss will do, to no effect.

        Args:
            loss: The loss; its graph is kept.
            trained: What its backward pass will compute the gradients of.
        """
        state = self._generator.get_state()
        self._end_forward(loss)
        rows = self._sketcher.empty_rows(len(self._rows))

        def receive(number: int, factors: GradientFactors) -> None:
            self._sketcher.add_(rows, number, factors)

        whole = [(get_gradient_edge(loss), torch.ones_like(loss))]
        self._capture.extra_backward(whole, receive, trained)
        rows.cpu()
        self._curvature_rows = None
        self._generator.set_state(state)

    def _end_forward(self, loss: Tensor) -> list[LossNode]:
        nodes = find_losses(loss, self._capture.heard)
        self._capture.end_forward(loss)
        if self._sampled:
            self._record_curvature(loss, nodes)
        return nodes

    def end_backward(self) -> BatchRows:
        """Return what was recorded of the batch."""
        self._capture.end_backward()
        rows, found, sampled = self._rows, self._summary, self._curvature_rows
        if found is None:
            return BatchRows(rows, None, None, sampled)
        return BatchRows(rows, found.terms(), found.spread(), sampled, found.loss())

    def take(self) -> Float[Tensor, "n k"]:
        """Return the rows of the backward pass that has just ended, and expect one more."""
        rows, self._rows = self._rows, self._sketcher.empty_rows(len(self._rows))
        return rows

    def precondition(self, preconditioner: Preconditioner) -> None:
        """From now on, record in these coordinates."""
        self._preconditioner = preconditioner
        self._sketcher.precondition(preconditioner)

    def take_time(self, clock: Callable[[], float] | None) -> None:
        """From now on, take the time of making rows; or no longer."""
        self._capture.take_time(clock)

    @property
    def seconds(self) -> float:
        """How long making rows took since then."""
        return self._capture.seconds

    def seed(self, number: int) -> None:
        """Begin the labels that are to be sampled anew."""
        self._generator.manual_seed(number)

    def _record_curvature(self, loss: Tensor, nodes: Sequence[LossNode]) -> None:
        gradients = self._sampled_gradients(loss, nodes)
        n = len(self._rows)
        m = max(1, round(self._sampled * n))
        chosen = torch.randperm(n, generator=self._generator, device=self._generator.device)[:m]
        rows = self._sketcher.empty_rows(m)

        def receive(number: int, factors: GradientFactors) -> None:
            self._sketcher.add_(rows, number, factors if m == n else factors.select(chosen))

        self._capture.extra_backward(gradients, receive)
        self._curvature_rows = rows * (n / m) ** 0.5

    def _sampled_gradients(
        self, loss: Tensor, nodes: Sequence[LossNode]
    ) -> list[tuple[GradientEdge, Tensor]]:
        own = getattr(self._model, "sampled_output_gradients", None)
        if own is not None:
            pairs = own(loss, self._generator)
            return [(get_gradient_edge(outputs), grad) for outputs, grad in pairs]
        found = sampled_gradients(loss, nodes, self._generator)
        if not found:
            raise ValueError(
                f"The loss of `{type(self._model).__name__}.training_step` is none that labels can "
                "be sampled from: expected cross-entropy, binary cross-entropy, squared error, "
                "Huber's loss, or a method `sampled_output_gradients(loss, generator)` of the "
                "model. Write that method, or record with `curvature='none'`."
            )
        return found

    def sketch_gradient(self) -> Float[Tensor, "blocks k"]:
        """Sketch what stands in the parameters' ``.grad`` now, block by block."""
        return self._sketch_each(lambda p: p.grad if p.grad is not None else torch.zeros_like(p))

    def sketch_weights(self) -> Float[Tensor, "blocks k"]:
        """Sketch the parameters themselves, block by block, in the coordinates of the rows."""
        return self._sketch_each(torch.Tensor.detach, self._inverse_squares())

    def recorded_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients rows are parts of, each once."""
        first = [sources[0] for sources in self._selection.sources if sources]
        return list(dict.fromkeys(p for source in first for p in source.parameters()))

    def left_out_gradient(self, trained: Sequence[nn.Parameter]) -> Tensor:
        """Return the squared norm of the gradient of those that are trained but not recorded."""
        recorded = set(self.recorded_parameters())
        others = [p.grad for p in trained if p not in recorded]
        squares = [grad.double().square().sum() for grad in others if grad is not None]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def _sketch_each(
        self, value: Callable[[Tensor], Tensor], divisors: Sequence[Tensor] | None = None
    ) -> Float[Tensor, "blocks k"]:
        sketches = []
        for number, block_sources in enumerate(self._selection.sources):
            if not block_sources:  # Another optimizer's.
                sketches.append(self._sketcher.empty_rows(1)[0])
                continue
            source = block_sources[0]
            matrix = source.rule.layout([value(one) for one in source.parameters()])
            if divisors is not None:
                matrix = matrix * divisors[number].to(matrix)
            sketches.append(self._sketcher.sketch_matrix(number, matrix))
        return torch.stack(sketches)

    def _inverse_squares(self) -> list[Tensor] | None:
        """Return what turns coordinates of gradients into those of weights: their inverse."""
        if self._preconditioner is None:
            return None
        blocks = self._selection.blocks
        rows = torch.split(self._preconditioner.rows, [block.rows for block in blocks])
        columns = torch.split(self._preconditioner.columns, [block.columns for block in blocks])
        scales = [torch.outer(r, c) for r, c in zip(rows, columns, strict=True)]
        return [torch.where(scale > 0, scale**-2, 0) for scale in scales]

    def sum_blocks(self) -> None:
        """From now on, sum the rows of each block over all batches, for :meth:`block_sums`."""
        self._sums = self._sketcher.empty_rows(len(self._selection.blocks))

    def block_sums(self) -> Float[Tensor, "blocks k"]:
        """Return the sums since :meth:`sum_blocks`, and stop summing."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums

    def _receive(self, number: int, factors: GradientFactors) -> None:
        if self._sums is None:
            self._sketcher.add_(self._rows, number, factors)
            return
        part = torch.zeros_like(self._rows)
        self._sketcher.add_(part, number, factors)
        self._sums[number] += part.sum(dim=0)
        self._rows += part


def row_dtype(model: nn.Module) -> torch.dtype:
    """Return the number format of a model's rows: double precision, if all that is trained is."""
    is_double = all(one.dtype == torch.float64 for one in model.parameters() if one.requires_grad)
    return torch.float64 if is_double else torch.float32
