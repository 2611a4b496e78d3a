"""Probe: a fixed set of queries whose gradients are taken again and again while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.batch_contents import batch_size, require_batches
from tda_lightning.passes.batches import record_batch
from tda_lightning.passes.model_state import Mode, preserved_rng, preserved_state


class Probe:
    """The batches of a probe set, and the computation of their gradients."""

    def __init__(
        self,
        batches: list[Any],
        reduction: Literal["mean", "sum"],
        mode: Mode,
    ) -> None:
        self._batches = batches
        self._sizes = [batch_size(batch, "probe") for batch in batches]
        self._reduction = reduction
        self._mode = mode

    @property
    def n_batches(self) -> int:
        """Number of batches: each takes one forward and backward pass."""
        return len(self._batches)

    def __len__(self) -> int:
        """Return the number of probes."""
        return sum(self._sizes)

    def record(
        self, trainer: Trainer, model: LightningModule, rows: RowRecorder
    ) -> tuple[float, Float[Tensor, "n_probe k"]]:
        """Return the probes' mean loss at the current weights, and a sketched gradient for each.

        The trainer sets the precision; the model's state is preserved; ``rows`` is between batches.
        """
        probe_rows, total = [], 0.0
        with preserved_state(model, self._mode), torch.enable_grad():
            for batch, size in zip(self._batches, self._sizes, strict=True):
                moved = trainer.precision_plugin.convert_input(batch)
                with _precision(trainer):
                    loss, recorded = record_batch(model, rows, moved, "probe")
                factor = size if self._reduction == "mean" else 1
                probe_rows.append((recorded.rows * factor).cpu())
                total += float(loss) * factor
        return total / len(self), torch.cat(probe_rows)


def read_probe(probe: Any) -> list[Any]:
    """Read the batches of a probe once, without consuming random numbers.

    Raises:
        ValueError: If it is empty or shuffled.
    """
    if not isinstance(probe, DataLoader):
        return [probe]
    if isinstance(probe.sampler, RandomSampler):
        raise ValueError(
            "`probe` is a shuffled loader, so that its samples could not be identified "
            "afterwards; expected a fixed order. Create it with `shuffle=False`."
        )
    with preserved_rng(), _same_generator(probe.generator):
        batches = list(probe)
    require_batches(batches, "probe")
    return batches


@contextmanager
def _same_generator(generator: torch.Generator | None) -> Iterator[None]:
    if generator is None:
        yield
        return
    state = generator.get_state()
    yield
    generator.set_state(state)


def _precision(trainer: Trainer) -> Any:
    plugin = trainer.precision_plugin
    # Without training's loss scale, half precision would lose small gradients.
    has_scale = getattr(plugin, "scaler", None) is not None
    return nullcontext() if has_scale else plugin.forward_context()
