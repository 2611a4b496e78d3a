"""Targets with labels: which axis of the logits holds classes, and what labels are."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tda_lightning import Logit, LogProbability, Margin


class Tagger(nn.Module):
    """Returns its parameter: logits of any shape."""

    def __init__(self, *shape):
        super().__init__()
        torch.manual_seed(3)
        self.logits = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        return self.logits


LABELLED = [LogProbability, Margin, Logit]
SHAPES = {"sentences": (5, 7, 3), "short sentences": (5, 2, 3), "pictures": (5, 3, 4, 2)}


@pytest.mark.parametrize("target", LABELLED, ids=lambda one: one.__name__)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_classes_along_axis_one_are_classes(shape, target):
    last, (*places, classes) = Tagger(*shape), shape
    first = Tagger(*shape)
    first.logits = nn.Parameter(last.logits.detach().movedim(-1, 1))
    labels = torch.randint(classes, places, generator=torch.Generator().manual_seed(2))
    batch = (torch.zeros(5), labels)
    told = target()(first, batch)
    own = cross_entropy(first.logits, labels, reduction="none")
    assert torch.equal(target()(last, batch), told)
    assert torch.equal(target(class_axis=1)(first, batch), told)
    if target is LogProbability:
        torch.testing.assert_close(told, -own)
    chosen = Logit(1)
    assert torch.equal(chosen(first, batch), first.logits[:, 1])
    assert torch.equal(chosen(last, batch), last.logits[..., 1])


@pytest.mark.parametrize("target", [*LABELLED, lambda **axis: Logit(2, **axis)])
def test_classes_that_could_be_along_either_axis_are_asked_for(target):
    model, labels = Tagger(5, 4, 4), torch.randint(4, (5, 4))
    with pytest.raises(ValueError, match=r"cannot be told.*`class_axis=1` or `class_axis=-1`"):
        target()(model, (torch.zeros(5), labels))
    turned = Tagger(5, 4, 4)
    turned.logits = nn.Parameter(model.logits.detach().mT)
    batch = (torch.zeros(5), labels)
    assert torch.equal(target(class_axis=1)(model, batch), target(class_axis=-1)(turned, batch))


def test_a_class_of_logits_without_labels_needs_an_axis_unless_there_is_one_only():
    assert Logit(2)(Tagger(5, 3), torch.zeros(5)).shape == (5,)
    with pytest.raises(ValueError, match="labels are nothing: whether classes are along axis 1"):
        Logit(2)(Tagger(5, 3, 4), torch.zeros(5))
    assert Logit(2, class_axis=1)(Tagger(5, 3, 4), torch.zeros(5)).shape == (5, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_labels_are_integers_of_any_width(dtype):
    model, x, y = Tagger(7, 3), torch.zeros(7), torch.tensor([0, 2, 1, 1, 2, 0, 0])
    expected = Margin()(model, (x, y))
    assert torch.equal(Margin()(model, (x, y.to(dtype))), expected)
    for wrong in (y == 1, y.tolist(), y[:3], None):
        with pytest.raises(ValueError, match=r"Labels are .*expected integers of shape \(7,\)"):
            Margin(labels=lambda batch, wrong=wrong: wrong)(model, (x, y))


def test_a_forward_that_cannot_do_something_is_not_said_to_be_missing():
    class Unfinished(nn.Module):
        def forward(self, x):
            raise NotImplementedError("no such operator on this device")

    with pytest.raises(NotImplementedError, match="no such operator"):
        Margin()(Unfinished(), (torch.zeros(3), torch.zeros(3).long()))
