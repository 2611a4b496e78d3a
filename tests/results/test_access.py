"""Access to answers: by id, by position, in groups, as tables, and their arithmetic."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from unchecked_calls import type_checks_disabled

from tda_lightning import Scores
from tda_lightning.results import SampleScores

GENERATOR = torch.Generator().manual_seed(0)
TRAIN_IDS = torch.tensor([2, 3, 5, 7, 11, 13, 17])
SCORES = Scores(
    values=torch.randn(5, 7, generator=GENERATOR),
    query_ids=torch.tensor([20, 21, 22, 23, 24]),
    train_ids=TRAIN_IDS,
    method="TracIn()",
    provenance={"model": "Classifier"},
)
SAMPLES = SampleScores(SCORES.values[0], TRAIN_IDS, "TracIn()")


def test_training_samples_are_selected_by_their_ids_in_the_given_order():
    for ids in ([13, 2, 5], torch.tensor([13, 2, 5])):
        part = SCORES.of(ids)
        assert torch.equal(part.values, SCORES.values[:, [5, 0, 2]])
        assert part.train_ids.tolist() == [13, 2, 5]
        assert torch.equal(SAMPLES.of(ids).values, SAMPLES.values[[5, 0, 2]])
    assert SCORES.of([13, 2, 5]).of([5, 13]).train_ids.tolist() == [5, 13]
    assert SCORES.of([]).shape == (5, 0)


@pytest.mark.parametrize(("name", "instead"), [("proponents", "highest"), ("opponents", "lowest")])
def test_scores_of_one_query_name_the_method_to_call_instead(name, instead):
    with pytest.raises(AttributeError, match=rf"Call `\.{instead}\(k\)`, or `\.{name}\(k\)`"):
        getattr(SCORES[0], name)
    assert not hasattr(SCORES[0], "prononents")


def test_a_ranking_names_its_samples():
    top = SAMPLES.highest(3)
    assert torch.equal(SCORES.of(top).values, SCORES.of(top.ids).values)
    assert torch.equal(SAMPLES.of(top).values, top.values)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 4], r"Sample 4 is not among the 7 training samples"),
        ([18], r"Sample 18 is not among"),
    ],
    ids=["between", "beyond"],
)
def test_an_unknown_id_raises(ids, message):
    with pytest.raises(ValueError, match=message):
        SCORES.of(ids)


def test_queries_are_selected_by_position():
    row = SCORES[1]
    assert torch.equal(row.values, SCORES.values[1])
    assert row.provenance == {"model": "Classifier", "query": "21"}
    for key in (slice(1, 3), [1, 2], torch.tensor([False, True, True, False, False])):
        part = SCORES[key]
        assert torch.equal(part.values, SCORES.values[1:3])
        assert part.query_ids.tolist() == [21, 22]
    assert [float(each.values.sum()) for each in SCORES] == SCORES.values.sum(dim=1).tolist()
    assert (len(SCORES), SCORES.shape, len(SAMPLES)) == (5, (5, 7), 7)


def test_a_position_may_be_a_tensor():
    """Such as the result of `argmax`."""
    row = SCORES[torch.tensor(1)]
    assert torch.equal(row.values, SCORES.values[1])
    assert row.provenance == SCORES[1].provenance
    assert list(SCORES.proponents(3)[torch.tensor(1)]) == list(SCORES.proponents(3)[1])
    assert SCORES[[]].shape == (0, 7)


@pytest.mark.parametrize("ids", [{18, 20}, ["18"]], ids=["set", "texts"])
def test_ids_in_no_list_of_numbers_are_refused(ids):
    with (
        type_checks_disabled(),
        pytest.raises(ValueError, match="expected a list of whole"),
    ):
        SCORES.of(ids)


def test_two_positions_and_positions_out_of_range_raise():
    with pytest.raises(IndexError, match=r"has two positions; .* `scores\[0\]\.of\(\[17, 23\]\)`"):
        SCORES[0, 1]
    with pytest.raises(IndexError, match=r"`scores\[5\]` names no query; expected one below 5"):
        SCORES[5]


def test_differences_and_sums_are_those_of_the_values():
    other = replace(SCORES, values=SCORES.values.square(), method="Other()")
    difference = SCORES - other
    assert torch.equal(difference.values, SCORES.values - other.values)
    assert difference.method == "difference of TracIn(), Other()"
    assert torch.equal((SCORES + other).values, SCORES.values + other.values)
    with pytest.raises(ValueError, match="differ in their `query_ids`"):
        SCORES[:2] - SCORES[1:3]
    with pytest.raises(TypeError):
        SCORES - 1


def test_a_ranking_yields_one_ranking_per_query():
    ranking = SCORES.proponents(3)
    for row, query in enumerate(ranking):
        assert list(query) == list(SCORES[row].highest(3))
    assert len(ranking) == 5
    assert list(ranking[-1]) == list(SCORES[4].highest(3))
    with pytest.raises(IndexError, match=r"`ranking\[5\]` names no query"):
        ranking[5]


def test_groups_are_summed_on_both_axes():
    labels, train_labels = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([4, 9, 4, 9, 9, 4, 4])
    both = SCORES.grouped(labels, train_labels=train_labels)
    expected = [
        [SCORES.values[labels == q][:, train_labels == t].sum() for t in (4, 9)] for q in (0, 1)
    ]
    torch.testing.assert_close(both.values, torch.tensor(expected))
    assert (both.query_ids.tolist(), both.train_ids.tolist()) == ([0, 1], [4, 9])
    assert both.provenance["train groups"] == "2 of 7 samples"
    alone = SCORES.grouped(train_labels=train_labels)
    torch.testing.assert_close(alone.grouped(labels).values, both.values)
    with pytest.raises(ValueError, match=r"expected \(7,\), one label per training sample"):
        SCORES.grouped(train_labels=labels)


def test_tidy_tables_have_a_row_per_query_sign_and_rank():
    frame = SCORES.to_pandas(k=2)
    assert list(frame.columns) == ["query", "rank", "train_id", "score", "sign"]
    expected = [
        (query, rank, sample, score, sign)
        for query, row in zip(SCORES.query_ids.tolist(), SCORES, strict=True)
        for sign, side in ((1, row.highest(2)), (-1, row.lowest(2)))
        for rank, (sample, score) in enumerate(side)
    ]
    assert [tuple(line) for line in frame.itertuples(index=False)] == expected
    ranks = SCORES.proponents(2).to_pandas()
    assert ranks.equals(frame[frame["sign"] == 1].drop(columns="sign").reset_index(drop=True))
    assert list(SAMPLES.highest(2).to_pandas().columns) == ["rank", "train_id", "score"]


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_csv_files_hold_the_tables(tmp_path):
    path = tmp_path / "scores.csv"
    SCORES.to_csv(path)
    header, *rows = read(path)
    assert header == ["query", *map(str, TRAIN_IDS.tolist())]
    np.testing.assert_allclose(np.array(rows, float)[:, 1:], SCORES.values.numpy(), rtol=1e-6)
    SCORES.to_csv(path, k=1)
    header, *rows = read(path)
    assert header == ["query", "rank", "train_id", "score", "sign"]
    assert len(rows) == 10
    SAMPLES.to_csv(path)
    assert read(path)[1] == ["2", str(float(SAMPLES.values[0]))]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]


@pytest.mark.parametrize("name", ["scores.csv", "scores.CSV", "scores.parquet"])
def test_an_archive_is_not_saved_under_the_name_of_a_table(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a name that ends in `.npz`.*`to_csv`"):
        SCORES.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_query_whose_scores_are_all_zero_has_no_proponents():
    values = SCORES.values.clone()
    values[1] = 0
    silent = replace(SCORES, values=values)
    assert "  query 21: all scores are zero" in repr(silent).splitlines()
    assert "  query 21: none, all of these scores are zero" in repr(silent.proponents(3))
    assert "proponents" in repr(silent).splitlines()[1]
    assert repr(silent[1]).endswith("all scores are zero")
    assert silent._repr_html_().count("none, all scores are zero") == 2  # On either side.
