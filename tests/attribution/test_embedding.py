"""Embeddings: answers to all queries at once, against asking anew and against running forward."""

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import GradientSimilarity, Scores, TracIn, Unrolled, embed
from tda_lightning.attribution import Linear, SampledLabels
from tda_lightning.results import Embedding

RUN = ls.record(ls.problem(scale=0.7), lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1))
EXACT = Unrolled(SampledLabels(), Linear())


@pytest.mark.parametrize("method", [TracIn(), Unrolled(), GradientSimilarity("dot")], ids=repr)
def test_an_embedding_answers_as_its_method_does(method):
    expected = method.attribute(RUN, ls.queries(), progress=False)
    found = embed(RUN, method, progress=False).attribute(ls.queries())
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.train_ids, expected.train_ids)
    assert (found.method, found.provenance) == (expected.method, expected.provenance)


def test_it_is_what_running_forward_gives():
    """Carry what every sample did to the weights and to the buffer from step to step."""
    moved = torch.zeros(ls.N_TRAIN, ls.D, dtype=torch.float64)
    buffer = torch.zeros_like(moved)
    for step in RUN:
        pushed = torch.zeros_like(moved).index_add_(0, step.sample_ids, step.sketch)
        hessian = step.curvature_rows.mT @ step.curvature_rows + 0.1 * torch.eye(ls.D).double()
        buffer = 0.9 * buffer + pushed - moved @ hessian
        moved = moved + step.lr * buffer
    torch.testing.assert_close(embed(RUN, EXACT, progress=False).vectors, moved)


def test_files_give_back_what_was_saved(tmp_path):
    saved = embed(RUN, EXACT, progress=False)
    saved.save(tmp_path / "embedding.npz")
    again = Embedding.load(tmp_path / "embedding.npz")
    assert torch.equal(again.vectors, saved.vectors)
    assert torch.equal(again.train_ids, saved.train_ids)
    assert (again.method, again.provenance) == (saved.method, saved.provenance)
    assert repr(again).startswith("Embedding of 11 training samples in 5 dimensions by Unrolled(")
    with pytest.raises(ValueError, match="with the class that saved it"):
        Scores.load(tmp_path / "embedding.npz")


def test_a_method_that_is_not_linear_has_none():
    with pytest.raises(ValueError, match="is not linear in the query; expected a method that is"):
        embed(RUN, GradientSimilarity("cosine"))
