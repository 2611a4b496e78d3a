"""Embeddings, against the method they embed, and against a recursion forward in time."""

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import GradientSimilarity, Scores, TracIn, Unrolled, embed
from tda_lightning.attribution import Averaged, Linear, SampledLabels
from tda_lightning.results import Embedding

RUN = ls.record(ls.problem(scale=0.7), lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1))
EXACT = Unrolled(SampledLabels(), Linear(4.0))


LINEAR = [TracIn(), Unrolled(), GradientSimilarity("dot"), Averaged()]


@pytest.mark.parametrize("method", LINEAR, ids=repr)
def test_an_embedding_scores_queries_as_its_method_does(method):
    expected = method.attribute(RUN, ls.queries(), progress=False)
    scores = embed(RUN, method, progress=False).attribute(ls.queries())
    torch.testing.assert_close(scores.values, expected.values)
    assert torch.equal(scores.train_ids, expected.train_ids)
    assert (scores.method, scores.provenance) == (expected.method, expected.provenance)


def test_the_vectors_match_a_recursion_forward_in_time():
    """Carry each sample's effect on the weights and on the buffer from step to step."""
    displacement = torch.zeros(ls.N_TRAIN, ls.D, dtype=torch.float64)
    buffer = torch.zeros_like(displacement)
    for step in RUN:
        gradients = torch.zeros_like(displacement).index_add_(0, step.sample_ids, step.sketch)
        hessian = step.curvature_rows.mT @ step.curvature_rows + 0.1 * torch.eye(ls.D).double()
        buffer = 0.9 * buffer + gradients - displacement @ hessian
        displacement = displacement + step.lr * buffer
    torch.testing.assert_close(embed(RUN, EXACT, progress=False).vectors, displacement)


def test_a_saved_embedding_can_be_loaded(tmp_path):
    saved = embed(RUN, EXACT, progress=False)
    saved.save(tmp_path / "embedding.npz")
    loaded = Embedding.load(tmp_path / "embedding.npz")
    assert torch.equal(loaded.vectors, saved.vectors)
    assert torch.equal(loaded.train_ids, saved.train_ids)
    assert (loaded.method, loaded.provenance) == (saved.method, saved.provenance)
    assert (loaded.to_pandas().loc[loaded.train_ids] == loaded.vectors.numpy()).all(axis=None)
    assert repr(loaded).startswith("Embedding of 11 training samples in 5 dimensions by Unrolled(")
    with pytest.raises(ValueError, match="with the class that saved it"):
        Scores.load(tmp_path / "embedding.npz")


def test_a_method_that_is_not_linear_cannot_be_embedded():
    with pytest.raises(ValueError, match="is not linear in the query; expected a method that is"):
        embed(RUN, GradientSimilarity("cosine"))


def test_a_device_without_double_precision_is_replaced_with_a_warning():
    with pytest.warns(UserWarning, match=r"`device='mps'` has no double .* on the CPU"):
        embedding = embed(RUN, EXACT, device="mps", progress=False)
    assert torch.equal(embedding.vectors, embed(RUN, EXACT, progress=False).vectors)
