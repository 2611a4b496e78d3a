"""`export`: a run or a saved result as CSV, Parquet or NumPy, with the same numbers in each."""

import csv
import errno

import numpy as np
import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, HDF5Store, Scores
from tda_lightning.cli import main
from tda_lightning.results import SampleScores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "run.tda"
    quiet_trainer(GradientRecorder(path)).fit(Plain(mlp()), loader(vectors()))
    return path


@pytest.fixture
def scores(tmp_path):
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    result = Scores(values, torch.tensor([0, 1, 2]), torch.tensor([7, 11, 13, 17, 19]), "method")
    result.save(tmp_path / "scores.npz")
    return result


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_gives_its_visits(run, tmp_path, capsys):
    out = tmp_path / "visits.csv"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "26 rows of step, epoch, learning_rate, sample_id, weight" in capsys.readouterr().out
    rows = read_csv(out)
    facts = list(HDF5Store.open(run).facts)
    ids = torch.cat([step.sample_ids for step in facts])
    assert [int(row["sample_id"]) for row in rows] == ids.tolist()
    assert [float(row["weight"]) for row in rows] == pytest.approx(
        torch.cat([step.weights for step in facts]).tolist()
    )
    assert {float(row["learning_rate"]) for row in rows} == {0.1}


def test_scores_give_a_row_per_query_and_sample(scores, tmp_path):
    out = tmp_path / "scores.csv"
    assert main(["export", str(tmp_path / "scores.npz"), "--out", str(out)]) == 0
    rows = read_csv(out)
    values = torch.tensor([float(row["score"]) for row in rows])
    torch.testing.assert_close(values.view(3, 5), scores.values)
    assert [int(row["train_id"]) for row in rows] == 3 * scores.train_ids.tolist()


def test_the_top_of_scores_are_proponents_and_opponents(scores, tmp_path):
    out = tmp_path / "top.csv"
    assert main(["export", str(tmp_path / "scores.npz"), "--out", str(out), "--top", "2"]) == 0
    rows = read_csv(out)
    scores.to_csv(tmp_path / "python.csv", k=2)
    assert rows == read_csv(tmp_path / "python.csv")
    best = [row for row in rows if row["sign"] == "1" and row["query"] == "1"]
    assert [int(row["train_id"]) for row in best] == scores.proponents(2).ids[1].tolist()
    assert [int(row["rank"]) for row in best] == [0, 1]
    assert len(rows) == 2 * 3 * 2


def test_all_formats_hold_the_same_table(scores, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in (".npy", ".parquet"):
        source, out = tmp_path / "scores.npz", tmp_path / f"scores{suffix}"
        assert main(["export", str(source), "--out", str(out)]) == 0
    array = np.load(tmp_path / "scores.npy")
    table = parquet.read_table(tmp_path / "scores.parquet")
    assert list(array.dtype.names) == table.column_names == ["query", "train_id", "score"]
    for name in table.column_names:
        assert table[name].to_pylist() == array[name].tolist()
    np.testing.assert_allclose(array["score"].reshape(3, 5), scores.values.numpy())


def test_self_influence_is_exported(tmp_path):
    SampleScores(torch.tensor([1.0, 2.0]), torch.tensor([3, 5]), "m").save(tmp_path / "own.npz")
    assert main(["export", str(tmp_path / "own.npz"), "--out", str(tmp_path / "own.csv")]) == 0
    assert read_csv(tmp_path / "own.csv") == [
        {"train_id": "3", "score": "1.0"},
        {"train_id": "5", "score": "2.0"},
    ]


def test_the_top_of_self_influence_is_refused(tmp_path, capsys):
    SampleScores(torch.tensor([1.0, 2.0]), torch.tensor([3, 5]), "m").save(tmp_path / "own.npz")
    words = ["--out", str(tmp_path / "own.csv"), "--top", "1"]
    assert main(["export", str(tmp_path / "own.npz"), *words]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "`--top` is for scores of queries" in message
    assert "has one score per training sample" in message
    assert not (tmp_path / "own.csv").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--out", "scores.xlsx"], 2, "no known suffix; expected .csv, .parquet, .npy"),
        ([], 2, "Missing option '--out'"),
        (["--out", "visits.csv", "--top", "3"], 2, "a run has none"),
    ],
)
def test_wrong_options_exit_with_2(run, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *words]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_result_exits_with_1(tmp_path, capsys):
    (tmp_path / "other.npz").write_bytes(b"nothing of the kind")
    words = ["export", str(tmp_path / "other.npz"), "--out", str(tmp_path / "other.csv")]
    assert main(words) == 1
    assert "expected a result written by `save`" in capsys.readouterr().err
    assert not (tmp_path / "other.csv").exists()


def test_a_failed_write_names_the_file_and_not_its_temporary_name(
    run, tmp_path, monkeypatch, capsys
):
    def refuse(source, target):
        raise OSError(errno.EROFS, "Read-only file system", str(source))

    monkeypatch.setattr("os.replace", refuse)
    assert main(["export", str(run), "--out", str(tmp_path / "visits.csv")]) == 1
    expected = f"tda-lightning: `{tmp_path / 'visits.csv'}`: Read-only file system.\n"
    assert capsys.readouterr().err == expected
