"""RowRecorder: turn a model's forward and backward pass over a batch into sketch rows.

Training and queries use this code with the same recipe, so their rows are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
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
from tda_lightning.gradients.parameter_sketches import inverse_squares, sketch_parameters
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.stores.recipe import SampleAxis
from tda_lightning.stores.step import Preconditioner


@dataclass(frozen=True)
class BatchRows:
    """The recorded rows of a batch, with properties of its loss.

    Attributes:
        rows: Sketched contribution of each sample to the gradient of the loss, shape ``(n, k)``.
        terms: Number of loss terms that each sample's loss is the mean of, if known.
        spread: Trace of each sample's Hessian with respect to the outputs, divided by its squared
            gradient there, if known. Both are weighted as in the loss of the batch.
        curvature_rows: Rows for labels sampled from the model, if requested. The expected sum of
            their outer products is the Gauss-Newton matrix of the loss.
        loss: Name of the loss, if known.
    """

    rows: Float[Tensor, "n k"]
    terms: Float[Tensor, " n"] | None
    spread: Float[Tensor, " n"] | None
    curvature_rows: Float[Tensor, "m k"] | None
    loss: str = ""

    def curvature(self, weight: float) -> Float[Tensor, " n"] | None:
        """Return each visit's curvature, as :class:`Step` stores it, if known.

        Args:
            weight: Weight of each sample's loss in the loss of the batch.
        """
        if self.spread is None or self.terms is None:
            return None
        return weight * self.spread / self.terms


class RowRecorder:
    """Record the sketch rows of one batch after another.

    The order is :meth:`start`, forward, :meth:`start_backward`, backward, :meth:`end_backward`.

    The recorder is a context manager that attaches hooks on entry and removes them on exit. It does
    not change the model's parameters.

    Args:
        model: The module to record.
        selection: The layers and parameters to record.
        batch_dims: Axis of the samples in layers whose names match a pattern, where not the first.
        projector: Sketches the gradients.
        dtype: Number format of the rows.
        sampled: Share of each batch for which rows from sampled labels are recorded too.
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
        self._hooks = ExitStack()
        self._capture = Capture(model, selection.sources, batch_dims, passes)
        self._summary: LossSummary | None = None
        self._preconditioner: Preconditioner | None = None
        self._curvature_rows: Tensor | None = None
        self._rows = self._sketcher.empty_rows(0)
        self._sums: Tensor | None = None

    def paused(self) -> AbstractContextManager[None]:
        """Pause all recorders of the model, for an extra pass that is not to be recorded."""
        return self._capture.switch.paused()

    @property
    def dimension(self) -> int:
        """Length ``k`` of a row."""
        return self._sketcher.dimension

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Number of columns per block, or ``None`` if all blocks share the columns of a row."""
        return self._sketcher.widths

    def __enter__(self) -> RowRecorder:
        """Attach the hooks."""
        self._hooks.enter_context(recordable(self._model))
        self._hooks.enter_context(self._capture)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def start(self, n: int) -> None:
        """Prepare for the forward pass of a batch of ``n`` samples."""
        self._capture.start(n)
        self._reset_rows(n)

    def continue_batch(self) -> None:
        """Prepare for another backward pass of the same batch, through the same graph or not."""
        n = len(self._rows)
        self._capture.continue_batch(n)
        self._reset_rows(n)

    def _reset_rows(self, n: int) -> None:
        self._rows = self._sketcher.empty_rows(n)
        self._summary = self._curvature_rows = None

    def start_backward(self, loss: Tensor) -> None:
        """Prepare for the backward pass of the batch's loss."""
        self._summary = LossSummary(self._end_forward(loss), len(self._rows))
        self._capture.start_backward(self._receive)

    def extra_backward(self, loss: Tensor, trained: Sequence[nn.Parameter]) -> None:
        """Run and record the backward pass of a loss, and discard the rows; for timing.

        Args:
            loss: The loss; its graph is retained.
            trained: The parameters whose gradients the backward pass computes.
        """
        random_state = self._generator.get_state()
        self._end_forward(loss)
        rows = self._sketcher.empty_rows(len(self._rows))

        def receive(number: int, factors: GradientFactors) -> None:
            self._sketcher.add_(rows, number, factors)

        start = [(get_gradient_edge(loss), torch.ones_like(loss))]
        self._capture.extra_backward(start, receive, trained)
        rows.cpu()
        self._curvature_rows = None
        self._generator.set_state(random_state)

    def _end_forward(self, loss: Tensor) -> list[LossNode]:
        loss_nodes = find_losses(loss, self._capture.output_edges)
        self._capture.end_forward(loss)
        if self._sampled:
            self._record_curvature(loss, loss_nodes)
        return loss_nodes

    def end_backward(self) -> BatchRows:
        """Return the recorded rows of the batch."""
        self._capture.end_backward()
        rows, summary, curvature_rows = self._rows, self._summary, self._curvature_rows
        if summary is None:
            return BatchRows(rows, None, None, curvature_rows)
        return BatchRows(rows, summary.terms(), summary.spread(), curvature_rows, summary.loss())

    def take(self) -> Float[Tensor, "n k"]:
        """Return the rows of the last backward pass, and prepare for one more."""
        rows, self._rows = self._rows, self._sketcher.empty_rows(len(self._rows))
        return rows

    def precondition(self, preconditioner: Preconditioner) -> None:
        """Record rows in the coordinates of a preconditioner from now on."""
        self._preconditioner = preconditioner
        self._sketcher.precondition(preconditioner)

    def take_time(self, clock: Callable[[], float] | None) -> None:
        """Reset ``seconds``, and measure the time spent on rows; ``None`` stops measuring."""
        self._capture.take_time(clock)

    @property
    def seconds(self) -> float:
        """Time spent on rows since :meth:`take_time`."""
        return self._capture.seconds

    def seed(self, number: int) -> None:
        """Seed the generator of the sampled labels."""
        self._generator.manual_seed(number)

    def _record_curvature(self, loss: Tensor, loss_nodes: Sequence[LossNode]) -> None:
        gradients = self._sampled_gradients(loss, loss_nodes)
        n = len(self._rows)
        m = max(1, round(self._sampled * n))
        chosen = torch.randperm(n, generator=self._generator, device=self._generator.device)[:m]
        rows = self._sketcher.empty_rows(m)

        def receive(number: int, factors: GradientFactors) -> None:
            self._sketcher.add_(rows, number, factors if m == n else factors.select(chosen))

        self._capture.extra_backward(gradients, receive)
        self._curvature_rows = rows * (n / m) ** 0.5

    def _sampled_gradients(
        self, loss: Tensor, loss_nodes: Sequence[LossNode]
    ) -> list[tuple[GradientEdge, Tensor]]:
        sample = getattr(self._model, "sampled_output_gradients", None)
        if sample is not None:
            pairs = sample(loss, self._generator)
            return [(get_gradient_edge(outputs), grad) for outputs, grad in pairs]
        gradients = sampled_gradients(loss, loss_nodes, self._generator)
        if not gradients:
            raise ValueError(
                f"Labels cannot be sampled for the loss of `{type(self._model).__name__}."
                "training_step`: expected cross-entropy, binary cross-entropy, squared error, "
                "Huber's loss, or a method `sampled_output_gradients(loss, generator)` of the "
                "model. Write that method, or record with `curvature='none'`."
            )
        return gradients

    def sketch_gradient(self) -> Float[Tensor, "blocks k"]:
        """Sketch the current ``.grad`` of the parameters, block by block."""

        def gradient(parameter: Tensor) -> Tensor:
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

        return sketch_parameters(self._sketcher, self._selection.sources, gradient)

    def sketch_weights(self) -> Float[Tensor, "blocks k"]:
        """Sketch the parameters themselves, block by block, in the coordinates of the rows."""
        scales = None
        if self._preconditioner is not None:
            scales = inverse_squares(self._preconditioner, self._selection.blocks)
        sources = self._selection.sources
        return sketch_parameters(self._sketcher, sources, torch.Tensor.detach, scales)

    def recorded_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all recorded blocks, without duplicates."""
        first_sources = [sources[0] for sources in self._selection.sources if sources]
        return list(dict.fromkeys(p for source in first_sources for p in source.parameters()))

    def left_out_gradient(self, trained: Sequence[nn.Parameter]) -> Tensor:
        """Return the squared gradient norm of the trained parameters that are not recorded."""
        recorded = set(self.recorded_parameters())
        grads = [p.grad for p in trained if p not in recorded]
        squares = [grad.double().square().sum() for grad in grads if grad is not None]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def sum_blocks(self) -> None:
        """Start to sum the rows of each block over all samples, for :meth:`block_sums`."""
        self._sums = self._sketcher.empty_rows(len(self._selection.blocks))

    def block_sums(self) -> Float[Tensor, "blocks k"]:
        """Return the sums of rows since :meth:`sum_blocks`, and stop summing."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums

    def _receive(self, number: int, factors: GradientFactors) -> None:
        if self._sums is None:
            self._sketcher.add_(self._rows, number, factors)
            return
        block_rows = torch.zeros_like(self._rows)
        self._sketcher.add_(block_rows, number, factors)
        self._sums[number] += block_rows.sum(dim=0)
        self._rows += block_rows


def row_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's rows: float64 if all trained parameters are, else float32."""
    is_double = all(p.dtype == torch.float64 for p in model.parameters() if p.requires_grad)
    return torch.float64 if is_double else torch.float32
