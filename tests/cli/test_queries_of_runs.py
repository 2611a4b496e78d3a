"""`attribute` and `self-influence`: models and queries by import path, or by configuration."""

import inspect
import json
import sys
import textwrap

import pytest
import pytorch_lightning as pl
import torch
import yaml
from click.testing import CliRunner
from lightning_models import quiet_trainer

from tda_lightning import GradientRecorder, Scores, attribute, self_influence
from tda_lightning.cli.answers import METHODS
from tda_lightning.cli.loading import import_object
from tda_lightning.cli.main import commands, main
from tda_lightning.report import report
from tda_lightning.results import SampleScores

PROJECT = """
    import pytorch_lightning as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    def dataset(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return TensorDataset(
            torch.randn(n, 5, generator=generator),
            torch.randint(3, (n,), generator=generator),
        )

    class Model(pl.LightningModule):
        def __init__(self, width: int = 7):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(pl.LightningDataModule):
        def __init__(self, n_query: int = 3):
            super().__init__()
            self.n_query = n_query

        def train_dataloader(self):
            return DataLoader(dataset(11, 0), batch_size=5)

        def test_dataloader(self):
            return DataLoader(dataset(self.n_query, 1), batch_size=2)

    def queries():
        return next(iter(DataLoader(dataset(3, 1), batch_size=3)))

    number = 5
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with a user's module, a recorded run and a checkpoint."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "project.py").write_text(textwrap.dedent(PROJECT))
    module = import_object(f"{folder / 'project.py'}:Model")
    data = import_object(f"{folder / 'project.py'}:Data")()
    torch.manual_seed(0)
    model = module(width=7)
    trainer = quiet_trainer(GradientRecorder(folder / "run.tda"))
    trainer.fit(model, data.train_dataloader())
    trainer.save_checkpoint(folder / "model.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "model.ckpt").read_bytes()[:100])
    config = {
        "trainer": {"max_epochs": 2},
        "model": {"class_path": "project.Model", "init_args": {"width": 7}},
        "data": {"class_path": "project.Data", "init_args": {"n_query": 5}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    untyped = {"model": {"width": 7}, "data": {"n_query": 5}}
    (folder / "without_classes.yaml").write_text(yaml.safe_dump(untyped))
    (folder / "fit_is_a_number.yaml").write_text("fit: 3")
    (folder / "short_name.yaml").write_text("model: {class_path: Model}")
    (folder / "class_is_a_number.yaml").write_text("model: {class_path: 3}")
    scores = attribute(folder / "run.tda", model, import_object(f"{folder}/project.py:queries")())
    return folder, scores


@pytest.fixture
def here(project, monkeypatch):
    folder, scores = project
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return scores


def run_json(*words):
    result = CliRunner().invoke(commands, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_attribute_gives_the_same_ranking_as_the_function(here):
    words = ["--model", "project:Model", "--checkpoint", "model.ckpt"]
    answer = run_json("attribute", "run.tda", *words, "--queries", "project:queries", "-k", "3")
    best = here.proponents(3)
    for row, entry in enumerate(answer["queries"]):
        assert [pair["sample"] for pair in entry["proponents"]] == best.ids[row].tolist()
        scores = [pair["score"] for pair in entry["proponents"]]
        assert scores == pytest.approx(best.values[row].tolist(), rel=1e-4)
    assert "Unrolled" in answer["method"]


def test_attribute_saves_all_scores(here, tmp_path):
    words = ["--model", "project.py:Model", "--checkpoint", "model.ckpt"]
    words += ["--queries", "project:queries", "--out", str(tmp_path / "scores.npz")]
    run_json("attribute", "run.tda", *words)
    saved = Scores.load(tmp_path / "scores.npz")
    torch.testing.assert_close(saved.values, here.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "config.yaml"],
        [
            *["--config", "without_classes.yaml"],
            *["--model", "project:Model", "--queries", "project:Data"],
        ],
        ["--config", "config.yaml", "--queries", "project:queries"],
        ["--config", "config.yaml", "--split", "train"],
    ],
    ids=["classes in it", "classes by option", "other queries", "another split"],
)
def test_a_configuration_and_a_checkpoint_describe_model_and_queries(here, words):
    answer = run_json("attribute", "run.tda", "--checkpoint", "model.ckpt", *words)
    n_query = {"--queries": 3, "--split": 11}.get(words[2] if len(words) == 4 else "", 5)
    assert len(answer["queries"]) == n_query


def test_self_influence_is_ranked(here, tmp_path):
    out = tmp_path / "own.npz"
    answer = run_json("self-influence", "run.tda", "--out", str(out))
    scores = [entry["score"] for entry in answer["samples"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 11
    assert sorted(SampleScores.load(out).values.tolist()) == pytest.approx(sorted(scores))


def test_the_text_shows_as_many_rows_as_wanted(here, capsys):
    assert main(["self-influence", "run.tda", "--show", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 3 + 1
    assert "and 8 more" in lines[-1]


def test_mislabeled_needs_only_the_run(here):
    answer = run_json("mislabeled", "run.tda", "--number", "3")
    scores = [entry["label_score"] for entry in answer["flagged"]]
    assert len(scores) == 3
    assert scores == sorted(scores)
    assert "given_label" not in answer["flagged"][0]


def test_mislabeled_shows_labels_of_the_training_data(here, capsys):
    words = ["--config", "config.yaml", "--checkpoint", "model.ckpt", "--number", "2"]
    assert main(["mislabeled", "run.tda", *words, "--trusted", "project:queries"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = ["sample", "label_score", "witnesses", "given_label", "predicted_label"]
    assert lines[1].split() == head
    assert "opposition" in lines[0]


@pytest.mark.parametrize("option", ["--train", "--trusted"])
def test_data_for_mislabeled_need_the_model(here, capsys, option):
    assert main(["mislabeled", "run.tda", option, "project:Data"]) == 2
    assert "need the trained model: `--model`" in " ".join(capsys.readouterr().err.split())


def test_a_report_without_charts_names_the_extra(here, tmp_path, monkeypatch, capsys):
    for package in ("bokeh", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("tda_lightning.report.api.has_bokeh", lambda: False)
    words = ["--config", "config.yaml", "--checkpoint", "model.ckpt"]
    assert main(["report", "run.tda", *words, "--out", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert "tda_lightning[report]" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_a_report_without_the_training_data_names_the_option(here, capsys):
    words = ["--model", "project:Model", "--checkpoint", "model.ckpt"]
    assert main(["report", "run.tda", *words, "--queries", "project:queries"]) == 2
    assert "`--train module:name`" in capsys.readouterr().err


def test_report_writes_a_page(here, tmp_path, capsys):
    out = tmp_path / "page.html"
    words = ["--config", "config.yaml", "--checkpoint", "model.ckpt", "--out", str(out)]
    names = ["--class-names", "cat, dog,emu", "--json"]
    assert main(["report", "run.tda", *words, "--title", "A <b>title</b>", *names]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"run": "run.tda", "out": str(out), "bytes": out.stat().st_size}
    page = out.read_text()
    assert "A &lt;b&gt;title" in page
    assert "A <b>title" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the model"),
        (["--model", "project:Model"], "Pass `--checkpoint`"),
        (["--model", "project"], "expected `module:name`"),
        (["--model", "nowhere:Model"], "cannot be imported: ModuleNotFoundError"),
        (["--model", "nowhere.py:Model"], "there is no such file"),
        (["--model", "project:Modell"], "`project` has no `Modell`. Did you mean `Model`?"),
        (["--model", "project:queries"], "is a list; expected a model"),
        (["--model", "project:number"], "is a int; expected a model"),
        (
            ["--model", "project:Model", "--checkpoint", "project.py"],
            "`project.py` is no checkpoint; expected a file saved by a Trainer or `torch.save`.",
        ),
        (
            ["--model", "project:Model", "--checkpoint", "project.py", "--trust-checkpoint"],
            "`project.py` is no checkpoint",
        ),
        (["--model", "project:Model", "--checkpoint", "cut.ckpt"], "`cut.ckpt` cannot be loaded"),
        (["--model", "project:Model", "--checkpoint", "absent.ckpt"], "does not exist"),
        (["--model", "torch.nn:Identity", "--checkpoint", "model.ckpt"], "do not fit `Identity`"),
        (["--config", "without_classes.yaml", "--checkpoint", "model.ckpt"], "no `class_path`"),
        (["--config", "project.py"], "`project.py` is no YAML"),
        (["--config", "fit_is_a_number.yaml"], "has no section `model`"),
        (["--config", "short_name.yaml"], "is `Model`; expected `module.Class`"),
        (["--config", "class_is_a_number.yaml"], "is `3`; expected `module.Class`"),
        (["--out", "scores.csv"], "`scores.csv` has no known suffix; expected .npz"),
        (
            ["--model", "project:Model", "--checkpoint", "model.ckpt"],
            "Name the queries",
        ),
        (
            [
                *["--model", "project:Model", "--checkpoint", "model.ckpt"],
                *["--queries", "project:Data", "--split", "predict"],
            ],
            "has no data for the split `predict`",
        ),
        (["--method", "nothing"], "'nothing' is not one of"),
    ],
)
def test_a_wrong_command_line_is_named_and_exits_with_2(here, capsys, words, message):
    assert main(["attribute", "run.tda", *words]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("is_saved", [False, True])
def test_more_samples_than_there_are_are_refused_before_the_work(here, tmp_path, capsys, is_saved):
    words = ["--config", "config.yaml", "--checkpoint", "model.ckpt"]
    words += ["--out", str(tmp_path / "scores.npz")] if is_saved else []
    assert main(["attribute", "run.tda", "-k", "12", *words]) == 2
    assert "`-k` is 12, and the run has 11 training samples" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["attribute", "run.tda", "-k", "11", *words]) == 0


def test_weights_of_another_architecture_do_not_fit(here, tmp_path, capsys):
    torch.save({"net.0.weight": torch.zeros(2, 2)}, tmp_path / "other.ckpt")
    words = ["--model", "project:Model", "--checkpoint", str(tmp_path / "other.ckpt")]
    assert main(["attribute", "run.tda", *words]) == 2
    assert "do not fit `Model`" in capsys.readouterr().err


def test_a_checkpoint_with_objects_needs_trust(here, tmp_path, capsys):
    saved = torch.load("model.ckpt", weights_only=True)
    torch.save({**saved, "note": pl.LightningDataModule}, tmp_path / "object.ckpt")
    words = ["--model", "project:Model", "--checkpoint", str(tmp_path / "object.ckpt")]
    words = ["attribute", "run.tda", *words, "--queries", "project:queries"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "If you trust its source, pass `--trust-checkpoint`" in " ".join(message.split())
    assert "weights_only" not in message
    assert main([*words, "--trust-checkpoint"]) == 0


def test_a_configuration_without_classes_names_the_option_of_the_training_data(here, capsys):
    words = [
        *["report", "run.tda", "--out", "page.html", "--config", "without_classes.yaml"],
        *["--checkpoint", "model.ckpt", "--model", "project:Model", "--queries", "project:Data"],
    ]
    assert main(words) == 2
    assert "`--train module:Class`" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("function", [attribute, self_influence, report])
def test_the_default_methods_are_those_of_the_functions(function):
    command = commands.commands[function.__name__.replace("_", "-")]
    default = next(option.default for option in command.params if option.name == "method")
    assert METHODS[default] == inspect.signature(function).parameters["method"].default
