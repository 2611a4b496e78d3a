"""Losses of single samples, against the loss without a reduction."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from lightning_models import Plain, loader, mlp, vectors
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset

from tda_lightning import sample_losses
from tda_lightning.passes.batch_contents import part_of

DATA = vectors()


def expected_losses(model):
    x, y = DATA.tensors
    return functional.cross_entropy(model.eval().net(x), y, reduction="none").detach()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_are_those_of_single_samples(reduction):
    model = Plain(mlp(), lambda out, y: functional.cross_entropy(out, y, reduction=reduction))
    expected = expected_losses(model)
    losses = sample_losses(model, loader(DATA), progress=False)
    torch.testing.assert_close(losses.values, expected)
    assert losses.train_ids.tolist() == list(range(13))
    assert losses.method == "loss"
    in_a_batch = sample_losses(model, DATA[:3])
    torch.testing.assert_close(in_a_batch.values, expected[:3])


def test_ids_are_those_of_the_data_below_subsets():
    model = Plain(mlp())
    expected = expected_losses(model)
    losses = sample_losses(model, loader(Subset(DATA, [11, 2, 5])), progress=False)
    assert losses.train_ids.tolist() == [2, 5, 11]
    torch.testing.assert_close(losses.values, expected[[2, 5, 11]])
    by_key = sample_losses(model, DATA[:3], sample_ids=lambda batch: [7, 3, 5])
    torch.testing.assert_close(by_key.of([7, 3, 5]).values, expected[:3])


def test_the_model_is_left_as_it_was():
    model = Plain(nn.Sequential(nn.Linear(7, 3), nn.Dropout())).train()
    before = torch.get_rng_state()
    sample_losses(model, DATA[:5])
    assert model.net[1].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_loader_and_a_failing_step_raise():
    model = Plain(mlp())
    with pytest.raises(ValueError, match="empty loader"):
        sample_losses(model, loader(Subset(DATA, []), shuffle=False))
    with pytest.raises(ValueError, match="failed on a batch of one sample"):
        sample_losses(model, (DATA.tensors[0][:2], torch.tensor([9, 9])))


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: torch.Tensor
    names: list


X, Y = torch.arange(15.0).reshape(5, 3), torch.arange(5)


@pytest.mark.parametrize(
    ("batch", "second"),
    [
        ([X, Y], [X[1:2], Y[1:2]]),
        (Pair(X, Y), Pair(X[1:2], Y[1:2])),
        ({"x": X, "names": list("abcde"), "size": 5}, {"x": X[1:2], "names": ["b"], "size": 5}),
        (Record(X, list("abcde")), Record(X[1:2], ["b"])),
        ((X, X[0], torch.tensor(3.0)), (X[1:2], X[0], torch.tensor(3.0))),
    ],
    ids=["list", "named tuple", "mapping", "dataclass", "shared tensors"],
)
def test_a_batch_is_cut_along_its_samples(batch, second):
    part = part_of(batch, 5, slice(1, 2))
    assert type(part) is type(batch)
    assert repr(part) == repr(second)


def as_pairs(x, y):
    return [(sample, int(label)) for sample, label in zip(x, y, strict=True)]


def as_mappings(x, y):
    return [{"x": sample, "y": int(label)} for sample, label in zip(x, y, strict=True)]


def as_two_lists(x, y):
    return [list(x), [{"label": label} for label in y]]


class OfSamples(Plain):
    """Takes samples as a ``collate_fn`` that joins nothing returns them."""

    def training_step(self, batch, batch_idx):
        if isinstance(batch[0], list):
            inputs, labels = batch[0], [target["label"] for target in batch[1]]
        else:
            pairs = [tuple(s.values()) if isinstance(s, dict) else s for s in batch]
            inputs, labels = zip(*pairs, strict=True)
        return self.loss(self.net(torch.stack(tuple(inputs))), torch.as_tensor(labels))


@pytest.mark.parametrize(
    ("form", "n"),
    [(as_pairs, 3), (as_pairs, 7), (as_mappings, 3), (as_mappings, 7), (as_two_lists, 3)],
)
def test_samples_in_lists_are_taken_one_by_one(form, n):
    """Also if there are as many samples as features."""
    model = OfSamples(mlp())
    losses = sample_losses(model, form(*DATA[:n]), progress=False)
    torch.testing.assert_close(losses.values, expected_losses(model)[:n])


@pytest.mark.xfail(strict=True, reason="n images of n channels look like n views of n samples")
def test_as_many_images_in_a_list_as_channels_are_cut_into_images():
    images = [torch.zeros(3, 5, 5), torch.zeros(3, 5, 7), torch.zeros(3, 7, 5)]
    part, _ = part_of([images, torch.arange(3)], 3, slice(1, 2))
    assert [image.shape for image in part] == [images[1].shape]


def test_views_in_a_list_are_cut_like_tensors():
    views = [torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)]
    part, label = part_of([views, torch.arange(2)], 2, slice(1, 2))
    assert [view.tolist() for view in part] == [[[3, 4, 5]], [[9, 10, 11]]]
    assert label.tolist() == [1]
