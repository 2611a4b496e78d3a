"""Targets with labels: the axis of the classes in the logits, and the labels' types."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tda_lightning import Logit, LogProbability, Margin


class FixedLogits(nn.Module):
    """Return a parameter of any shape as logits."""

    def __init__(self, *shape):
        super().__init__()
        torch.manual_seed(3)
        self.logits = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        return self.logits


LABELLED = [LogProbability, Margin, Logit]
SHAPES = {"sentences": (5, 7, 3), "short sentences": (5, 2, 3), "images": (5, 3, 4, 2)}


@pytest.mark.parametrize("target", LABELLED, ids=lambda target: target.__name__)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_classes_may_be_along_axis_one_or_along_the_last(shape, target):
    last, (*label_shape, classes) = FixedLogits(*shape), shape
    first = FixedLogits(*shape)
    first.logits = nn.Parameter(last.logits.detach().movedim(-1, 1))
    labels = torch.randint(classes, label_shape, generator=torch.Generator().manual_seed(2))
    batch = (torch.zeros(5), labels)
    values = target()(first, batch)
    losses = cross_entropy(first.logits, labels, reduction="none")
    assert torch.equal(target()(last, batch), values)
    assert torch.equal(target(class_axis=1)(first, batch), values)
    if target is LogProbability:
        torch.testing.assert_close(values, -losses)
    logit = Logit(1)
    assert torch.equal(logit(first, batch), first.logits[:, 1])
    assert torch.equal(logit(last, batch), last.logits[..., 1])


@pytest.mark.parametrize("target", [*LABELLED, lambda **axis: Logit(2, **axis)])
def test_an_ambiguous_class_axis_must_be_passed(target):
    model, labels = FixedLogits(5, 4, 4), torch.randint(4, (5, 4))
    with pytest.raises(ValueError, match=r"leave open whether.*`class_axis=1` or `class_axis=-1`"):
        target()(model, (torch.zeros(5), labels))
    transposed = FixedLogits(5, 4, 4)
    transposed.logits = nn.Parameter(model.logits.detach().mT)
    batch = (torch.zeros(5), labels)
    assert torch.equal(target(class_axis=1)(model, batch), target(class_axis=-1)(transposed, batch))


def test_a_logit_without_labels_needs_a_class_axis_if_there_are_several_axes():
    assert Logit(2)(FixedLogits(5, 3), torch.zeros(5)).shape == (5,)
    with pytest.raises(
        ValueError,
        match=r"labels are None\. These shapes leave open whether classes are along axis 1",
    ):
        Logit(2)(FixedLogits(5, 3, 4), torch.zeros(5))
    assert Logit(2, class_axis=1)(FixedLogits(5, 3, 4), torch.zeros(5)).shape == (5, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_labels_are_integers_of_any_width(dtype):
    model, x, y = FixedLogits(7, 3), torch.zeros(7), torch.tensor([0, 2, 1, 1, 2, 0, 0])
    expected = Margin()(model, (x, y))
    assert torch.equal(Margin()(model, (x, y.to(dtype))), expected)
    for wrong in (y == 1, y.tolist(), y[:3], None):
        with pytest.raises(ValueError, match=r"Labels are .*expected integers of shape \(7,\)"):
            Margin(labels=lambda batch, wrong=wrong: wrong)(model, (x, y))


def test_a_not_implemented_error_inside_forward_is_raised_unchanged():
    class Unfinished(nn.Module):
        def forward(self, x):
            raise NotImplementedError("no such operator on this device")

    with pytest.raises(NotImplementedError, match="no such operator"):
        Margin()(Unfinished(), (torch.zeros(3), torch.zeros(3).long()))
