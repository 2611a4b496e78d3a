"""Scores: rankings, averages, files, data frames and their printed form."""

import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tda_lightning import Scores
from tda_lightning.metrics import mislabel_auc, mislabel_recall, rank_agreement
from tda_lightning.results import SampleScores, TopScores

SCORES = Scores(
    values=torch.tensor([[0.5, -1.0, 0.0, 2.0], [-0.25, 4.0, 1.0, -3.0]]),
    query_ids=torch.arange(2),
    train_ids=torch.tensor([3, 5, 7, 11]),
    method="TracIn()",
    provenance={"model": "Classifier", "steps": "7"},
)
SAMPLES = SampleScores(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([3, 5, 7]), "TracIn()")


def test_proponents_and_opponents_are_named_by_their_ids():
    assert SCORES.proponents(2).ids.tolist() == [[11, 3], [5, 7]]
    assert SCORES.proponents(2).values.tolist() == [[2.0, 0.5], [4.0, 1.0]]
    assert SCORES.opponents(1).ids.tolist() == [[5], [11]]
    assert list(SAMPLES.highest(2)) == [(7, 2.0), (3, 0.5)]
    assert list(SAMPLES.lowest(1)) == [(5, -1.0)]


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_raises(k):
    with pytest.raises(ValueError, match=f"`k` is {k}; expected a number from 1 to 4"):
        SCORES.proponents(k)


@pytest.mark.parametrize("scores", [SCORES, SAMPLES], ids=lambda scores: type(scores).__name__)
def test_saved_scores_can_be_loaded(tmp_path, scores):
    scores.save(tmp_path / "scores.npz")
    loaded = type(scores).load(tmp_path / "scores.npz")
    assert torch.equal(loaded.values, scores.values)
    assert torch.equal(loaded.train_ids, scores.train_ids)
    assert loaded.method == scores.method
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npz"]


def test_files_of_another_class_raise(tmp_path):
    SAMPLES.save(tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="with the class that saved it"):
        Scores.load(tmp_path / "scores.npz")


def test_data_frames_are_labelled():
    frame = SCORES.to_pandas()
    assert frame.loc[1, 11] == -3.0
    assert (frame.index.name, frame.columns.name) == ("query", "train")
    assert SAMPLES.to_pandas()[7] == 2.0


def test_repr_shows_the_shape_and_the_extreme_samples():
    assert repr(SCORES).splitlines() == [
        "Scores of 2 queries x 4 training samples by TracIn()",
        "  query 0: proponents 11 (+2), 3 (+0.5); opponents 5 (-1)",
        "  query 1: proponents 5 (+4), 7 (+1); opponents 11 (-3), 3 (-0.25)",
    ]
    assert "highest 7 (+2), 3 (+0.5), 5 (-1)" in repr(SAMPLES)
    assert repr(SCORES.proponents(1)).splitlines()[1] == "  query 0: 11 (+2)"


def test_auc_is_the_probability_of_ranking_a_pair_correctly():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(5, (31,), generator=generator).float()
    wrong = torch.rand(31, generator=generator) < 0.3
    pairs = [float(a > b) + float(a == b) / 2 for a in values[wrong] for b in values[~wrong]]
    assert mislabel_auc(values, wrong) == pytest.approx(sum(pairs) / len(pairs))


def test_recall_counts_the_inspected_samples():
    values, wrong = torch.arange(20.0), torch.arange(20) % 9 == 1
    assert mislabel_recall(values, wrong, fraction=0.1) == pytest.approx(1 / 3)
    assert mislabel_recall(values, wrong, fraction=1.0) == 1.0


def test_files_hold_the_provenance_and_old_files_have_none(tmp_path):
    SCORES.save(tmp_path / "scores.npz")
    assert Scores.load(tmp_path / "scores.npz").provenance == SCORES.provenance
    with np.load(tmp_path / "scores.npz") as file:
        old_fields = {name: file[name] for name in file.files if name != "provenance"}
    np.savez(tmp_path / "old_fields.npz", **old_fields)
    assert Scores.load(tmp_path / "old_fields.npz").provenance == {}


def test_a_mean_averages_values_and_joins_the_provenance():
    other = replace(SCORES, values=3 * SCORES.values, provenance={"model": "Other", "steps": "7"})
    mean = Scores.mean([SCORES, other])
    torch.testing.assert_close(mean.values, 2 * SCORES.values)
    assert mean.method == "TracIn()"
    assert mean.provenance == {"model": "Classifier; Other", "steps": "7", "mean": "of 2"}
    assert Scores.mean([SCORES, replace(SCORES, method="X()")]).method == "mean of TracIn(), X()"


def test_concatenation_joins_the_queries_in_order():
    later = replace(SCORES, query_ids=torch.tensor([2, 3]))
    joined = Scores.concatenate([SCORES, later])
    assert joined.query_ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(joined.values, torch.cat([SCORES.values, SCORES.values]))


@pytest.mark.parametrize("join", [Scores.mean, Scores.concatenate], ids=lambda join: join.__name__)
def test_joining_scores_of_different_training_sets_raises(join):
    with pytest.raises(ValueError, match="differ in their `train_ids`; expected the same"):
        join([SCORES, replace(SCORES, train_ids=torch.tensor([3, 5, 7, 13]))])
    for nothing in ([], 0, [SCORES, 0]):
        with pytest.raises(ValueError, match="expected at least one `Scores`, in a list"):
            join(nothing)


def test_rank_agreement_is_the_correlation_of_ranks():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(7, (3, 11), generator=generator).float() for _ in range(2))
    scores = [Scores(v, torch.arange(3), torch.arange(11), "") for v in (first, second)]

    def ranks(row):
        return torch.stack([(row < v).sum() + ((row == v).sum() + 1) / 2 for v in row])

    for query, correlation in enumerate(rank_agreement(*scores)):
        pair = torch.stack([ranks(first[query]), ranks(second[query])])
        torch.testing.assert_close(
            correlation, torch.corrcoef(pair)[0, 1].double(), rtol=1e-5, atol=1e-6
        )


def test_rank_agreement_is_one_for_an_increasing_and_minus_one_for_a_decreasing_function():
    increasing, decreasing = (
        replace(SCORES, values=f(SCORES.values)) for f in (torch.exp, torch.neg)
    )
    assert rank_agreement(SCORES, increasing).tolist() == pytest.approx([1, 1])
    assert rank_agreement(SCORES, decreasing).tolist() == pytest.approx([-1, -1])
    with pytest.raises(ValueError, match="differ in their `query_ids`"):
        rank_agreement(SCORES, replace(SCORES, query_ids=torch.tensor([1, 2])))


def test_the_data_frame_of_top_scores_is_that_of_the_scores():
    top = TopScores(SCORES.proponents(2), SCORES.opponents(2), SCORES.query_ids, "TracIn()")
    assert top.to_pandas().equals(SCORES.to_pandas(k=2))
    assert len(top) == 2
    assert "query 1: 5 (+4), 7 (+1)" in repr(top)


@pytest.mark.parametrize("content", [b"nothing of the kind", b""], ids=["words", "nothing"])
def test_files_without_scores_raise(tmp_path, content):
    (tmp_path / "scores.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"scores\.npz` is damaged; expected a result"):
        Scores.load(tmp_path / "scores.npz")


def test_a_file_of_one_array_raises(tmp_path):
    np.save(tmp_path / "scores.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"expected a result .* not an archive of arrays"):
        Scores.load(tmp_path / "scores.npy")


def test_a_pickle_raises_without_the_advice_to_load_it(tmp_path):
    (tmp_path / "scores.npz").write_bytes(pickle.dumps({"values": 1}))
    with pytest.raises(ValueError, match="not an archive of arrays") as caught:
        Scores.load(tmp_path / "scores.npz")
    assert "allow_pickle" not in str(caught.value)


def test_a_missing_package_raises_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tda_lightning\[pandas\]'"):
        SCORES.to_pandas()
