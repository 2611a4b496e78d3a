"""Record one batch of a case in a real training, and compute each sample's row by autograd.

The reference is the gradient of the user's own loss of one sample, times the sample's share of the
batch's loss terms. A contrastive loss has no loss of one sample. There, the gradient of the whole
loss with respect to one sample's embeddings goes back through that sample alone.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from lightning_models import TrainingLog, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo_cases import Batch, Case, quiet
from zoo_precision import computing_in

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.recipe import LeftOut, Recipe

N = 5


@dataclass(frozen=True)
class Comparison:
    """Recorded rows beside their references.

    Attributes:
        error: Largest relative error of a row, over the compared parameters.
        trained: Number of trained parameters.
        recorded: How many of them are recorded.
        left_out: What is not recorded, and why.
    """

    error: float
    trained: int
    recorded: int
    left_out: tuple[LeftOut, ...]


def compare(case: Case, dtype: torch.dtype) -> Comparison:
    """Record one batch, and compare every row with its reference.

    Raises:
        ValueError: If the recorder refuses the model.
    """
    model = case.module(dtype)
    model.train(case.mode == "train")
    with computing_in(dtype), quiet():
        rows, recipe, batch = record_one_batch(model, case, dtype)
        expected = reference(model, case, batch)
    compared = [name for name in rows if name not in case.shared]
    given, wanted = (
        torch.cat([values[name] for name in compared], dim=1) for values in (rows, expected)
    )
    errors = (given - wanted).norm(dim=1) / wanted.norm(dim=1)
    recorded = sum(block.size for block in recipe.recorded_blocks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Comparison(float(errors.max()), trained, recorded, recipe.left_out)


def record_one_batch(
    model: pl.LightningModule, case: Case, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Recipe, Batch]:
    """Train for one step, and return the rows by parameter, the recipe and the batch."""
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity(), preconditioner="none")
    trainer = quiet_trainer(recorder, log, max_epochs=1)
    trainer.fit(model, DataLoader(case.dataset(N, dtype), batch_size=N))
    with torch.no_grad():  # Back to the weights of the step.
        for name, parameter in model.named_parameters():
            parameter.copy_(log.weights[0][name])
    return rows_by_parameter(model, store[0].sketch, store.recipe), store.recipe, log.batches[0]


def rows_by_parameter(model: pl.LightningModule, rows: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Split rows without projection into ``(n, size)`` for each recorded parameter.

    Parameters of a block lie one after the other, flattened. In a block of several columns, a
    weight's last column is its bias.
    """
    every_name = dict(model.named_parameters(remove_duplicate=False))
    first_names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for block, part in zip(recipe.blocks, rows.split(recipe.widths, dim=1), strict=True):
        parameters = [every_name[name] for name in block.parameters]
        if len(parameters) > 1 and block.columns > 1:
            matrix = part.unflatten(1, (block.rows, block.columns))
            parts = [matrix[..., :-1].flatten(1), matrix[..., -1]]
        else:
            parts = part.split([parameter.numel() for parameter in parameters], dim=1)
        for parameter, values in zip(parameters, parts, strict=True):
            assert first_names[parameter] not in found
            found[first_names[parameter]] = values
    return found


def reference(model: pl.LightningModule, case: Case, batch: Batch) -> dict[str, Tensor]:
    """Return each sample's row, ``(n, size)`` for each trained parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    is_contrastive = hasattr(model, "embed")
    roots = contrastive_roots(model, batch) if is_contrastive else own_losses(model, case, batch)
    samples = [gradients_of(root, trained.values()) for root in roots]
    columns = zip(trained, zip(*samples, strict=True), strict=True)
    return {name: torch.stack(column).reshape(len(samples), -1) for name, column in columns}


def gradients_of(root: Tensor, parameters: Collection[nn.Parameter]) -> list[Tensor]:
    """Return gradients by ``backward``, since ``autograd.grad`` misses those of checkpoints."""
    for parameter in parameters:
        parameter.grad = None
    root.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def own_losses(model: pl.LightningModule, case: Case, batch: Batch) -> Iterator[Tensor]:
    terms = case.terms(batch)
    for i in range(N):
        yield model.training_step(sample_of(batch, i), 0) * (int(terms[i]) / int(terms.sum()))


def contrastive_roots(model: pl.LightningModule, batch: Batch) -> Iterator[Tensor]:
    embeddings = [each.detach().requires_grad_() for each in model.embed(batch)]
    gradients = torch.autograd.grad(model.loss_of(*embeddings), embeddings)
    for i in range(N):
        pairs = zip(model.embed(sample_of(batch, i)), gradients, strict=True)
        yield sum((own[0] * gradient[i]).sum() for own, gradient in pairs)


def sample_of(batch: Batch, i: int) -> Batch:
    return {name: values[i : i + 1] for name, values in batch.items()}
