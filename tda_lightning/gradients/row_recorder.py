"""RowRecorder: turn a model's forward and backward pass over a batch into sketch rows.

Training and queries use this code with the same recipe, so their rows are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.capture.capture import Capture
from tda_lightning.gradients.capture.plain_batches import is_compiled, run_plainly
from tda_lightning.gradients.gradient_layouts import squared_norm, to_dense
from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import Node
from tda_lightning.gradients.losses import (
    DeferredSummary,
    LossNode,
    find_losses,
    label_gradients,
)
from tda_lightning.gradients.parameter_selection import ParameterSelection, named_parameters
from tda_lightning.gradients.row_pass import BatchRows, Coordinates, RowPass
from tda_lightning.gradients.sketching.block_maps import places
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.gradients.sketching.sketcher import Sketcher, inverse_squares, sketch_parameters
from tda_lightning.stores.recipe import SampleAxis
from tda_lightning.stores.step import Preconditioner

Labels = Literal["unread", "given", "sampled"]


class RowRecorder:
    """Record the sketch rows of one batch after another.

    The order is :meth:`start`, forward, :meth:`start_backward`, backward, :meth:`end_backward`.

    The recorder is a context manager that removes all its hooks on exit. It does not change the
    model's parameters.

    Args:
        model: The module to record.
        selection: The parameters to record.
        batch_dims: Axis of the samples in layers whose names match a pattern, if it is unclear.
        projector: Sketches the gradients.
        dtype: Number format of the rows.
        labels: With ``"sampled"``, rows for labels drawn by the model are recorded too. With
            ``"unread"``, no facts of the samples' losses are gathered.
        lost: Names of blocks whose rows are zero, since they cannot be separated.
        followed: Names of parameters in front of batch norms whose running statistics follow them.

    Attributes:
        label_weight: Factor of the curvature in the rows of sampled labels. With 0, there are none.
        known: Whose rows the batch has, as far as its data show it.
        preconditioner: The coordinates of the rows, if they are not raw.
        is_compiled: Whether the model is compiled; recorded batches run uncompiled.
        excluded: Numbers of the blocks that were known from the start not to be recordable.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: ParameterSelection,
        batch_dims: Mapping[str, SampleAxis],
        projector: Projector,
        dtype: torch.dtype,
        labels: Labels = "given",
        lost: Collection[str] = (),
        followed: Collection[str] = (),
    ) -> None:
        device = next(model.parameters()).device
        self._model, self._labels = model, labels
        self.label_weight = 1.0
        self._generator = torch.Generator(device)
        self._selection = selection
        self._places = places(selection)
        self._sketcher: Sketcher = projector.bind(selection.blocks, device, dtype)
        parameters = named_parameters(selection, lost)
        self._capture = Capture(model, parameters, batch_dims, self._block_of, followed)
        self.is_compiled = is_compiled(model)
        self._plain = ExitStack()
        self._summary = DeferredSummary((), 0)
        self.preconditioner: Preconditioner | None = None
        self._curvature_rows: Tensor | None = None
        numbers = {block.name: number for number, block in enumerate(selection.blocks)}
        self.excluded = {numbers[name] for name in lost if name in numbers}
        self._n, self.known = 0, KnownRows()
        self._counts: dict[nn.Parameter, int] = {}
        self._rows = self._new_pass()
        self._sums: Tensor | None = None

    def _new_pass(self) -> RowPass:
        return RowPass(self._sketcher, self._places, self._n, self._counts)

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

    @property
    def lost(self) -> dict[int, str]:
        """Why the rows of a block cannot be recorded, by the block's number."""
        return {self._places[p].block: reason for p, reason in self._capture.lost.items()}

    def rows_of(self, node: Node) -> SampleLayout | IrregularRows | None:
        """Return where the samples lie in a node of the last graph, if that is known."""
        return self._capture.rows_of(node)

    def joined_rows(self) -> int:
        """Return the rows per sample in the last graph, if nothing shows whose they are; else 0."""
        return self._capture.joined_rows(self._n, self.known)

    @property
    def normalized(self) -> set[str]:
        """Names of the parameters that a batch norm follows."""
        return self._capture.normalized

    @property
    def samples_labels(self) -> bool:
        """Whether labels are sampled in the next backward pass."""
        return self._labels == "sampled" and self.label_weight != 0

    def __enter__(self) -> RowRecorder:
        """Attach to the model; hooks are attached to the graph of each batch."""
        self._capture.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove the hooks."""
        self._rows.remove_hooks()
        self._capture.detach()
        self._plain.close()

    def start(self, n: int) -> None:
        """Prepare for the forward pass of a batch of ``n`` samples."""
        self._plain.close()
        self._plain.enter_context(run_plainly(self.is_compiled))
        self._n = n
        self.continue_batch()

    def continue_batch(self) -> None:
        """Prepare for another backward pass of the same batch, through the same graph or not."""
        self._rows.remove_hooks()  # Of a pass that was not finished.
        self._rows = self._new_pass()
        self._summary, self._curvature_rows = DeferredSummary((), self._n), None

    def start_backward(self, loss: Tensor, coordinates: Coordinates | None = None) -> None:
        """Prepare for the backward pass of the batch's loss.

        ``coordinates`` are those of its rows and of all later ones, if they follow from the
        gradients that this pass accumulates.
        """
        loss_nodes = self._read_graph(loss)
        if self._labels != "unread":
            switch = self._capture.switch
            self._summary = DeferredSummary(
                loss_nodes, self._n, lambda: bool(switch.pauses), self._capture.rows_of, loss
            )
            are_known = self.known.are_irregular
            self._summary.is_irregular = are_known or self._capture.has_irregular_rows
        self._rows.sum_blocks(self._sums)
        is_once, lost = not self._capture.is_reentrant, self._capture.lost
        self._capture.start_backward(*self._rows.receivers(lost, coordinates, is_once))

    def extra_backward(
        self, loss: Tensor, trained: Sequence[nn.Parameter], label_weight: float
    ) -> None:
        """Run and record the backward pass of a loss, and discard the rows; for timing."""
        self.label_weight = label_weight
        random_state = self._generator.get_state()
        self._read_graph(loss)
        rows = self._new_pass()
        self._capture.timed_backward(loss, trained, *rows.receivers(self._capture.lost))
        with self._capture.time_added():
            rows.rows().cpu()
        self._curvature_rows = None
        self._generator.set_state(random_state)

    def _read_graph(self, loss: Tensor) -> list[LossNode]:
        self._capture.end_backward()  # Of an earlier pass that was not finished.
        self._capture.read_graph(loss, self._n, self.known)
        if self._labels == "unread":
            return []
        loss_nodes = find_losses(loss, self._capture.with_samples)
        if self._labels == "sampled":
            self._record_curvature(loss, loss_nodes)
        return loss_nodes

    def end_backward(self) -> BatchRows:
        """Return the recorded rows of the batch."""
        self._capture.end_backward()
        self._plain.close()
        with self._capture.time_added():
            rows = self._rows.rows()
        self.preconditioner = self._rows.preconditioner or self.preconditioner
        return BatchRows(rows, self._summary, self._curvature_rows)

    def take(self) -> Float[Tensor, "n k"]:
        """Return the rows of the last backward pass, and prepare for one more."""
        return self._rows.take()

    def precondition(self, preconditioner: Preconditioner) -> None:
        """Record rows in the coordinates of a preconditioner from now on."""
        self.preconditioner = preconditioner
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
        if self._labels != "sampled":
            return
        # The first numbers for seeds in succession are alike, unless their bits are mixed.
        number = (number ^ number >> 16) * 0x45D9F3B & 0xFFFFFFFF
        self._generator.manual_seed((number ^ number >> 16) * 0x45D9F3B & 0xFFFFFFFF)

    def _record_curvature(self, loss: Tensor, loss_nodes: Sequence[LossNode]) -> None:
        weight = self.label_weight
        if weight == 0:
            self._curvature_rows = self._sketcher.empty_rows(0)
            return
        with self._capture.switch.others_paused():
            gradients = label_gradients(self._model, loss, loss_nodes, self._generator)
        rows = self._new_pass()
        self._capture.extra_backward(gradients, *rows.receivers(self._capture.lost))
        self._curvature_rows = rows.rows() if weight == 1 else rows.rows() * weight**0.5

    def sketch_gradient(self) -> Float[Tensor, "blocks k"]:
        """Sketch the current ``.grad`` of the parameters, block by block."""

        def gradient(parameter: Tensor) -> Tensor:
            grad = parameter.grad
            return torch.zeros_like(parameter) if grad is None else to_dense(grad)

        return sketch_parameters(self._sketcher, self._selection, gradient)

    def sketch_weights(self) -> Float[Tensor, "blocks k"]:
        """Sketch the parameters themselves, block by block, in the coordinates of the rows."""
        scales = None
        if self.preconditioner is not None:
            scales = inverse_squares(self.preconditioner, self._selection.blocks)
        return sketch_parameters(self._sketcher, self._selection, torch.Tensor.detach, scales)

    def recorded_parameters(self) -> list[nn.Parameter]:
        """Return the recorded parameters."""
        lost = self._capture.lost
        return [p for p in self._selection.all_parameters() if p not in lost]

    def left_out_gradient(self, trained: Sequence[nn.Parameter]) -> float:
        """Return the squared gradient norm of the trained parameters that are not recorded."""
        recorded = set(self.recorded_parameters())
        return squared_norm(p for p in trained if p not in recorded)

    def sum_blocks(self) -> None:
        """Start to sum the rows of each block over all samples, for :meth:`block_sums`."""
        sums = self._sketcher.empty_rows(len(self._selection.blocks))
        self._sums = torch.cat([sums, sums[:, :1]], dim=1)

    def block_sums(self) -> Float[Tensor, "blocks k1"]:
        """Return the sums of rows since :meth:`sum_blocks`, and stop summing.

        The last column bounds the rounding error of each sum.
        """
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums

    def _block_of(self, parameter: nn.Parameter) -> int | None:
        place = self._places[parameter]
        return place.block if self._sketcher.is_whole(place) else None
