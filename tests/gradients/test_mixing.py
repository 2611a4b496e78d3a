"""Mixed samples are recognised by their labels, and can be recorded as two rows."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.losses import compares_all_pairs, mixes_samples
from tda_lightning.stores import MemoryStore

N, CLASSES, SHARE = 7, 3, 0.7
GENERATOR = torch.Generator().manual_seed(0)
LABELS, ORDER = torch.tensor([0, 1, 2, 0, 1, 2, 2]), torch.tensor([3, 0, 1, 6, 5, 4, 2])
OTHERS = LABELS[ORDER]
HOT, OTHER_HOT = (one_hot(labels, CLASSES).float() for labels in (LABELS, OTHERS))
SOFT = torch.rand(N, CLASSES, generator=GENERATOR).softmax(dim=1)


def distribution(target):
    return lambda out: cross_entropy(out, target)


CASES = {
    "two losses": (
        lambda out: SHARE * cross_entropy(out, LABELS) + (1 - SHARE) * cross_entropy(out, OTHERS),
        True,
    ),
    "two losses without a reduction": (
        lambda out: (
            SHARE * cross_entropy(out, LABELS, reduction="none")
            + (1 - SHARE) * cross_entropy(out, OTHERS, reduction="none")
        ).mean(),
        True,
    ),
    "distributions": (distribution(SHARE * HOT + (1 - SHARE) * OTHER_HOT), True),
    "one loss": (distribution(LABELS), False),
    "one-hot labels": (distribution(HOT), False),
    "smoothed labels": (lambda out: cross_entropy(out, LABELS, label_smoothing=0.1), False),
    "soft labels": (distribution(SOFT), False),
    "two heads": (
        lambda out: cross_entropy(out, LABELS) + cross_entropy(out.flip(1), OTHERS),
        False,
    ),
    "other labels": (
        lambda out: cross_entropy(out, LABELS) + cross_entropy(out, LABELS.clamp(max=1)),
        False,
    ),
    "squares": (lambda out: (out - HOT).square().mean(), False),
}


@pytest.mark.parametrize("name", CASES)
def test_mixed_samples_are_recognised_by_their_labels(name):
    loss, expected = CASES[name]
    out = torch.randn(N, CLASSES, generator=GENERATOR).requires_grad_()
    assert mixes_samples(loss(out)) is expected


class Mixup(Plain):
    """Mixes the batch in its step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = torch.arange(len(x)).roll(1)
        out = self.net(SHARE * x + (1 - SHARE) * x[order])
        return SHARE * cross_entropy(out, y) + (1 - SHARE) * cross_entropy(out, y[order])


def test_a_training_with_mixup_warns_once():
    store = MemoryStore()
    with pytest.warns(UserWarning, match="as in mixup or CutMix") as caught:
        quiet_trainer(GradientRecorder(store)).fit(Mixup(mlp()), loader(vectors()))
    assert sum("mixup" in str(warning.message) for warning in caught) == 1
    assert len(store) == 6


def mixed(samples):
    ids, x, y = torch.utils.data.default_collate(samples)
    order = torch.arange(len(x)).roll(1)
    shares = torch.tensor([SHARE, 1 - SHARE]).repeat_interleave(len(x))
    x = (SHARE * x + (1 - SHARE) * x[order]).repeat(2, 1)
    return {"ids": torch.cat([ids, ids[order]]), "x": x, "y": torch.cat([y, y[order]]), "w": shares}


class Parts(Plain):
    """Takes each mixture twice, once per label."""

    def training_step(self, batch, batch_idx):
        losses = cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")
        return 2 * (batch["w"] * losses).mean()


def test_with_the_remedy_each_sample_has_its_part_of_the_gradient():
    data = [(i, *vectors()[i]) for i in range(13)]
    store, model = MemoryStore(), Parts(nn.Linear(7, CLASSES))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    recorder = GradientRecorder(store, sample_ids="ids", projector=Identity())
    batches = DataLoader(data, batch_size=5, collate_fn=mixed)
    quiet_trainer(recorder, max_epochs=1).fit(model, batches)
    reference = Mixup(nn.Linear(7, CLASSES))
    reference.load_state_dict(start)
    reference.training_step(vectors()[:5], 0).backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters()])
    step = store[0]
    assert step.sample_ids.tolist() == [0, 1, 2, 3, 4, 4, 0, 1, 2, 3]
    torch.testing.assert_close(step.sketch.sum(dim=0), gradient)
    x, y = vectors()[:5]
    mixture = SHARE * x[0] + (1 - SHARE) * x[4]
    for row, label, share in ((0, y[0], SHARE), (5, y[4], 1 - SHARE)):
        reference.zero_grad()
        (share / 5 * cross_entropy(reference.net(mixture), label)).backward()
        expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
        torch.testing.assert_close(step.sketch[row], expected)


COLUMN, FLAT = torch.arange(7.0)[:, None], torch.arange(7.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda out: ((out - FLAT) ** 2).mean(), True),
        (lambda out: (FLAT - out).abs().mean(), True),
        (lambda out: (out[:, 0] - COLUMN).pow(2).mean(), True),
        (lambda out: ((out - COLUMN) ** 2).mean(), False),
        (lambda out: (out[:, 0] - FLAT).abs().mean(), False),
        (lambda out: ((out - out[:, 0]) ** 2).mean(), False),
    ],
    ids=["square", "swapped", "column", "equal columns", "equal vectors", "pairs of outputs"],
)
def test_targets_that_broadcast_against_outputs_are_recognised(loss, expected):
    out = torch.randn(7, 1, generator=GENERATOR).requires_grad_() * 1.0
    assert compares_all_pairs(loss(out), 7) is expected


def test_a_training_with_targets_of_another_shape_warns_once():
    def loss(out, y):
        return (out - y.float()).abs().mean()

    net = nn.Linear(7, 1)
    with pytest.warns(
        UserWarning, match=r"each output is compared with the targets of all"
    ) as all_:
        quiet_trainer(GradientRecorder(MemoryStore()), max_epochs=2).fit(
            Plain(net, loss), loader(vectors())
        )
    assert sum("targets of all samples" in str(each.message) for each in all_) == 1
