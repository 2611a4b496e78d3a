"""RowRecorder: from a model's forward and backward pass over a batch to its sketch rows.

Training and queries are recorded by this same code, under the same recipe, which is why their rows
can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.capture import Capture
from tda_lightning.factors import GradientFactors
from tda_lightning.layers import Survey
from tda_lightning.projectors import Projector
from tda_lightning.sketcher import Sketcher


class RowRecorder:
    """Records batch by batch: :meth:`start`, forward, :meth:`listen`, backward, :meth:`finish`.

    A context manager, whose hooks are attached inside. The model's parameters are left alone.

    Args:
        model: The module to record.
        surveyed: What of it is recorded.
        batch_dims: Axis of the samples in layers whose names match a pattern, where not 0.
        projector: What to sketch their gradients with.
        dtype: Number format of the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        surveyed: Survey,
        batch_dims: Mapping[str, int],
        projector: Projector,
        dtype: torch.dtype,
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._surveyed = surveyed
        self._sketcher: Sketcher = projector.bind(surveyed.blocks, device, dtype)
        self._capture = Capture(surveyed.sources, batch_dims, self._receive)
        self._rows = self._sketcher.empty_rows(0)
        self._sums: Tensor | None = None

    @property
    def dimension(self) -> int:
        """Length ``k`` of a row."""
        return self._sketcher.dimension

    def __enter__(self) -> RowRecorder:
        """Attach the hooks."""
        _forget_compiled_code(self._model)
        self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove the hooks."""
        self._capture.__exit__(kind, error, trace)
        _forget_compiled_code(self._model)

    def start(self, n: int) -> None:
        """Expect a forward pass over ``n`` samples."""
        self._rows = self._sketcher.empty_rows(n)
        self._capture.start(n)

    def listen(self) -> None:
        """Expect the backward pass of that batch's loss."""
        self._capture.listen()

    def finish(self) -> Float[Tensor, "n k"]:
        """Return the rows of the batch: what each sample added to the gradient of the loss."""
        self._capture.stop()
        return self._rows

    def sketch_gradient(self) -> Float[Tensor, "blocks k"]:
        """Sketch what stands in the parameters' ``.grad`` now, block by block."""
        return self._sketch_each(lambda p: p.grad if p.grad is not None else torch.zeros_like(p))

    def sketch_weights(self) -> Float[Tensor, "blocks k"]:
        """Sketch the parameters themselves, block by block."""
        return self._sketch_each(torch.Tensor.detach)

    def left_out_gradient(self) -> Tensor:
        """Return the squared norm of the gradient of all parameters that are not recorded."""
        recorded = {one for (source, *_) in self._surveyed.sources for one in source.parameters()}
        others = [p.grad for p in self._model.parameters() if p not in recorded]
        squares = [grad.double().square().sum() for grad in others if grad is not None]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def _sketch_each(self, value: Callable[[Tensor], Tensor]) -> Float[Tensor, "blocks k"]:
        sketches = []
        for number, (source, *_) in enumerate(self._surveyed.sources):
            matrix = source.rule.layout([value(one) for one in source.parameters()])
            sketches.append(self._sketcher.sketch_matrix(number, matrix))
        return torch.stack(sketches)

    def sum_blocks(self) -> None:
        """From now on, sum the rows of each block over all batches, for :meth:`block_sums`."""
        self._sums = self._sketcher.empty_rows(len(self._surveyed.blocks))

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


def _forget_compiled_code(model: nn.Module) -> None:
    """Make compiled models notice that hooks have come or gone: their code does not look again."""
    is_wrapped = any("_orig_mod" in name for name, _ in model.named_modules())
    if is_wrapped or any(one._compiled_call_impl is not None for one in model.modules()):
        torch.compiler.reset()
