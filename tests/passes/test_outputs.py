"""What `forward` gets of a batch: inputs first or by name, and what it takes beside them."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tda_lightning.passes.outputs import labels_of, outputs_of

X = torch.arange(15.0).reshape(5, 3)
MASK = torch.tensor([[1.0, 1.0, 0.0]]).expand(5, 3)
EXPECTED = X * MASK


class WithMask(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None
        return input_ids if attention_mask is None else input_ids * attention_mask


class OtherOrder(nn.Module):
    def forward(self, attention_mask, input_ids):
        return input_ids * attention_mask


class OtherName(nn.Module):
    def forward(self, tokens, attention_mask):
        return tokens * attention_mask


class Keywords(nn.Module):
    def forward(self, **inputs):
        return WithMask()(**inputs)


class KeywordsBeside(nn.Module):
    def forward(self, x, **others):
        assert not others
        return x


@pytest.mark.parametrize("module", [WithMask, OtherOrder, OtherName, Keywords])
def test_forward_gets_the_mask_and_no_labels(module):
    batch = {"labels": torch.zeros(5), "attention_mask": MASK, "input_ids": X}
    torch.testing.assert_close(outputs_of(module(), batch), EXPECTED)


def test_what_forward_does_not_name_is_not_passed():
    batch = {"x": X, "index": torch.arange(5), "y": torch.zeros(5)}
    assert outputs_of(KeywordsBeside(), batch) is X
    assert outputs_of(nn.Identity(), batch) is X


def test_tensors_and_sequences_are_as_before():
    for batch in (X, [X, torch.zeros(5)], (X,)):
        assert outputs_of(WithMask(), batch) is X


def test_inputs_of_any_name_are_found_where_forward_names_them():
    class Words(nn.Module):
        def forward(self, words):
            return words

    assert outputs_of(Words(), {"labels": torch.zeros(5), "words": X}) is X


@pytest.mark.parametrize("fields", ["label image", "image weight label", "image label"])
def test_fields_of_a_named_tuple_are_found_by_their_names(fields):
    values = {"label": torch.arange(5), "image": X, "weight": torch.ones(5)}
    batch = namedtuple("Batch", fields)(*(values[field] for field in fields.split()))
    assert outputs_of(nn.Identity(), batch) is X
    assert labels_of(batch) is values["label"]


def test_fields_of_other_names_are_taken_by_position():
    batch = namedtuple("Batch", "pixels digit")(X, torch.arange(5))
    assert outputs_of(nn.Identity(), batch) is X
    assert labels_of(batch) is batch.digit


def test_labels_that_come_first_are_no_inputs():
    batch = namedtuple("Batch", "label pixels")(torch.arange(5), X)
    assert labels_of(batch) is batch.label
    with pytest.raises(ValueError, match="no inputs in a batch with the keys"):
        outputs_of(nn.Identity(), batch)


@dataclass
class Samples:
    labels: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class TakesSamples(nn.Module):
    def forward(self, samples):
        return samples.input_ids * samples.attention_mask


@pytest.mark.parametrize("module", [WithMask, OtherOrder, TakesSamples])
def test_fields_of_a_dataclass_are_found_by_their_names(module):
    """Unless `forward` takes it as it is."""
    batch = Samples(torch.arange(5), X, MASK)
    torch.testing.assert_close(outputs_of(module(), batch), EXPECTED)
    assert labels_of(batch) is batch.labels


def test_inputs_that_do_not_come_first_are_named():
    """Ids in front of the inputs have another dtype than the weights."""
    batch = (torch.arange(5)[:, None].expand(5, 3), X, torch.zeros(5))
    with pytest.raises(ValueError, match=r"failed on the batch's inputs.*or `batch\[1\]` if ids"):
        outputs_of(nn.Linear(3, 2), batch)
