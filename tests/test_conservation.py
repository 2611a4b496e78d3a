"""Rows of a step sum to the sketch of the gradient that the optimizer used."""

import pytest
import torch
from lightning_models import Diary, Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.nn import functional

from tda_lightning import (
    CountSketch,
    GradientRecorder,
    Identity,
    Kronecker,
    KroneckerCountSketch,
    MemoryStore,
)
from tda_lightning.layers import find_rule


class AppliedDiary(Diary):
    """Keeps the gradient after clipping, as the optimizer used it."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if len(self.gradients) > len(self.applied):
            self.applied.append({k: p.grad.clone() for k, p in module.named_parameters()})

    def __init__(self):
        super().__init__()
        self.applied = []


def sketch_of(gradients, model, blocks, projector):
    sketcher = projector.bind(blocks, torch.device("cpu"), torch.float32)
    total = torch.zeros(sketcher.dimension)
    for number, block in enumerate(blocks):
        layout = find_rule(model.get_submodule(block.name)).layout
        total += sketcher.sketch_matrix(number, layout([gradients[p] for p in block.parameters]))
    return total


@pytest.mark.parametrize(
    "projector",
    [Identity(), Kronecker(width=5), CountSketch(dimension=53), KroneckerCountSketch(53, width=7)],
    ids=lambda projector: type(projector).__name__,
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ],
    ids=str,
)
def test_rows_sum_to_the_sketch_of_the_gradient(projector, settings):
    store, diary = MemoryStore(), AppliedDiary()
    model = Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    trainer = quiet_trainer(GradientRecorder(store, projector=projector), diary, **settings)
    trainer.fit(model, loader(vectors()))
    assert len(store) == len(diary.applied) == (4 if "accumulate_grad_batches" in settings else 6)
    for step, gradients in zip(store, diary.applied, strict=True):
        expected = sketch_of(gradients, model, store.recipe.blocks, projector)
        assert (step.sketch.sum(dim=0) - expected).norm() / expected.norm() < 1e-5


def test_weights_carry_accumulation_and_clipping():
    store = MemoryStore()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), **settings)
    trainer.fit(Plain(mlp()), loader(vectors()))
    step = store[0]
    assert len(step.sample_ids) == 10
    assert step.sketch.sum(dim=0).norm() == pytest.approx(1e-3, rel=1e-3)
    assert (step.weights < 1 / 10).all()


def test_a_weight_that_also_acts_elsewhere_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 7)
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            return self.head(functional.linear(self.layer(x), self.layer.weight))

    recorder = GradientRecorder(MemoryStore())
    with pytest.raises(ValueError, match=r"Linear `net.layer` is not its gradient"):
        quiet_trainer(recorder).fit(Plain(Functional()), loader(vectors()))
    store = MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store, layers=["net.head"]))
    with pytest.warns(UserWarning, match=r"net.layer.*not among `layers`"):
        trainer.fit(Plain(Functional()), loader(vectors()))
    assert len(store) == 6
