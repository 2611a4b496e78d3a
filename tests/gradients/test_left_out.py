"""Parameters whose rows cannot be told apart are left out by name, with their share."""

import re

import pytest
import torch
from lightning_models import AppliedGradientsLog, Plain, loader, quiet_trainer, vectors
from networks import data_of
from pytorch_lightning.callbacks import ModelCheckpoint
from replayed import assert_rows_are_gradients
from torch import nn

from tda_lightning import GradientRecorder, HDF5Store, Identity, TracIn, attribute
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import same

D = 7
IGNORED = "ignore:GradientRecorder. not recorded"
NAMES = ["net.side.weight", "net.side.bias"]


class ExtraRow(nn.Module):
    """A head, and beside it a layer that sees the batch with its first sample once more."""

    def __init__(self, strength):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.side, self.strength = nn.Linear(D, 3), nn.Linear(D, 3), strength

    def forward(self, x):
        rows = self.side(torch.cat([x, x[:1]]))
        # Row n is the first sample's, too.
        mixed = rows[:-1] + rows[-1:]
        return self.head(x) + self.strength * mixed


def model_of(strength=0.1):
    return Plain(ExtraRow(strength).double())


def train(store, model=None, *callbacks, epochs=2, batch_size=5, ckpt_path=None, **settings):
    torch.manual_seed(3)
    recorder = GradientRecorder(store, projector=Identity(), **settings)
    trainer = quiet_trainer(*callbacks, recorder, max_epochs=epochs)
    model = model or model_of()
    trainer.fit(model, loader(data_of((D,)), batch_size, shuffle=False), ckpt_path=ckpt_path)
    return model


def squared(gradients, names):
    return float(sum(gradients[name].square().sum() for name in names))


def test_the_warning_and_the_recipe_name_the_share_of_what_is_left_out():
    store, log = MemoryStore(), AppliedGradientsLog()
    with pytest.warns(UserWarning, match="GradientRecorder: not recorded: ") as caught:
        train(store, None, log, audit=1)
    messages = " ".join(str(w.message) for w in caught if "not recorded" in str(w.message))
    entries = {entry.name: entry for entry in store.recipe.left_out}
    assert list(entries) == NAMES
    total = squared(log.gradients[0], log.gradients[0])
    for name, size in zip(NAMES, (21, 3), strict=True):
        entry = entries[name]
        assert (entry.layer, entry.size) == ("Linear", size)
        share = squared(log.gradients[0], [name]) / total
        (printed,) = re.findall(r"has ([\d.]+)% of the first step's squared gradient", entry.reason)
        assert float(printed) == pytest.approx(100 * share, abs=0.006)
        assert f"{name}`" in messages
        assert f"{printed}%" in messages
    for audit, gradients in zip(store.audits(), log.gradients, strict=True):
        assert audit.left_out == pytest.approx(squared(gradients, NAMES))


@pytest.mark.filterwarnings(IGNORED)
def test_all_other_parameters_are_recorded_exactly():
    store, log = MemoryStore(), AppliedGradientsLog()
    train(store, None, log)
    names = [name for block in store.recipe.blocks for name in block.parameters]
    for step, gradients in zip(store, log.gradients, strict=True):
        expected = [
            torch.zeros_like(gradients[name]) if name in NAMES else gradients[name]
            for name in names
        ]
        flat = torch.cat([gradient.flatten() for gradient in expected])
        torch.testing.assert_close(step.sketch.sum(dim=0), flat)
        assert bool(step.sketch[:, flat == 0].eq(0).all())


@pytest.mark.filterwarnings(IGNORED)
def test_queries_have_no_gradient_where_training_has_none():
    store = MemoryStore()
    model = train(store)
    x, y = data_of((D,))[:4]
    rows = record_queries(model, (x, y), like=store)
    start = 0
    for block in store.recipe.blocks:
        part = rows[:, start : start + block.size]
        start += block.size
        assert bool(part.any()) == (block.name not in NAMES)
    scores = attribute(store, model, (x, y), method=TracIn(), progress=False)
    expected = TracIn().attribute(store, rows).values
    torch.testing.assert_close(scores.values, expected)
    assert scores.provenance["recorded"] == "24 of 48 parameters"


class Filtered(nn.Module):
    """Multiplies frequencies by complex numbers, which are a parameter or a view of a real one."""

    def __init__(self, strength, is_view=False):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.strength, self.is_view = nn.Linear(D, 3), strength, is_view
        numbers = torch.randn(4, 2, dtype=torch.float64)
        self.filter = nn.Parameter(numbers if is_view else torch.view_as_complex(numbers))

    def forward(self, x):
        weights = torch.view_as_complex(self.filter) if self.is_view else self.filter
        filtered = torch.fft.irfft(torch.fft.rfft(x) * weights, n=D)
        return self.head(x + self.strength * filtered)


def test_small_complex_parameters_are_left_out_by_name():
    store, log = MemoryStore(), AppliedGradientsLog()
    with pytest.warns(UserWarning, match=r"`net` \(4 parameters\): its numbers are complex"):
        train(store, Plain(Filtered(1e-2).double()), log)
    assert [block.name for block in store.recipe.blocks] == ["net.head.weight", "net.head.bias"]
    for step, gradients in zip(store, log.gradients, strict=True):
        flat = torch.cat([gradients[f"net.head.{kind}"].flatten() for kind in ("weight", "bias")])
        torch.testing.assert_close(step.sketch.sum(dim=0), flat)


@pytest.mark.filterwarnings(IGNORED)
def test_large_complex_parameters_are_refused_with_the_remedy():
    model = Plain(Filtered(30.0).double())
    nn.init.normal_(model.net.head.weight, std=30.0)
    with pytest.raises(ValueError, match=r"complex parameters of `net`.*`torch.view_as_complex"):
        train(MemoryStore(), model)


def test_complex_views_of_real_parameters_are_recorded():
    assert_rows_are_gradients(Filtered(1.0, is_view=True).double(), data_of((D,)))


def test_above_a_tenth_of_the_gradient_the_training_is_refused_with_the_remedy():
    log = AppliedGradientsLog()
    message = (
        r"of the first step's squared gradient cannot be recorded: `net.side.weight`: .*; it has "
        r".*`net.side.bias`: .*`layers=\['!net.side.weight', '!net.side.bias'\]`"
    )
    with pytest.raises(ValueError, match=message) as error:
        train(MemoryStore(), model_of(1.0), log)
    gradients = log.gradients[0]
    share = squared(gradients, NAMES) / squared(gradients, gradients)
    assert share > 0.1
    assert str(error.value).startswith(f"{share:.0%} of")


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("layers", [["net.head"], ["!net.side.weight", "!net.side.bias"]], ids=str)
def test_the_remedies_accept_what_is_left(layers):
    store, log = MemoryStore(), AppliedGradientsLog()
    train(store, model_of(1.0), log, layers=layers)
    for step, gradients in zip(store, log.gradients, strict=True):
        flat = torch.cat([gradients[f"net.head.{kind}"].flatten() for kind in ("weight", "bias")])
        torch.testing.assert_close(step.sketch.sum(dim=0), flat)


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_resumed_run_leaves_out_the_same_parameters(tmp_path):
    def saver(folder):
        return ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)

    def fit(run, epochs, ckpt_path=None):
        recorder = GradientRecorder(tmp_path / run, projector=Identity())
        trainer = quiet_trainer(
            recorder, saver(run + "-saved"), max_epochs=epochs, enable_checkpointing=True
        )
        data = loader(data_of((D,)), shuffle=False)
        trainer.fit(model_of(), data, ckpt_path=ckpt_path)

    fit("whole", 4)
    fit("parts", 2)
    fit("parts", 4, tmp_path / "parts-saved" / "epoch=1.ckpt")
    whole, parts = (HDF5Store.open(tmp_path / run) for run in ("whole", "parts"))
    assert len(whole) == len(parts) == 12
    assert parts.recipe.left_out == whole.recipe.left_out
    assert [entry.name for entry in parts.recipe.left_out] == NAMES
    assert all(map(same, parts, whole))


@pytest.mark.parametrize("batch_size", [5, 4, 3])
def test_a_bias_that_a_batch_norm_subtracts_is_left_out_and_nothing_else(batch_size, caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    store, log = MemoryStore(), AppliedGradientsLog()
    data = torch.utils.data.Subset(data_of((D,)), range(12))
    recorder = GradientRecorder(store, projector=Identity())
    with caplog.at_level("DEBUG", logger="tda_lightning"):
        quiet_trainer(recorder, log).fit(Plain(net), loader(data, batch_size, drop_last=True))
    named = re.findall(r"Linear `net.0.bias` .*batch norm.*has no effect", caplog.text)
    assert len(named) == 1
    assert [entry.name for entry in store.recipe.left_out] == ["net.0.bias"]
    for step, gradients in zip(store, log.gradients, strict=True):
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        torch.testing.assert_close(step.sketch.sum(dim=0), flat, rtol=1e-9, atol=1e-12)
        assert not step.sketch[:, 35:40].any()


class Shortcut(nn.Module):
    """Its first layer goes into a batch norm and around it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head((x + self.norm(x)).tanh())


def test_a_bias_that_also_goes_around_a_batch_norm_is_recorded():
    store, log = MemoryStore(), AppliedGradientsLog()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, log).fit(Plain(Shortcut().double()), loader(data_of((D,))))
    assert not store.recipe.left_out
    for step, gradients in zip(store, log.gradients, strict=True):
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        torch.testing.assert_close(step.sketch.sum(dim=0), flat, rtol=1e-9, atol=1e-12)
        assert step.sketch[:, 35:40].any()


class EmptyTable(nn.Module):
    """A head, and a table of no categories, as libraries for tables of data have one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.table = nn.Linear(D, 3), nn.Embedding(0, 3)

    def forward(self, x):
        none = torch.zeros(len(x), 0, dtype=torch.int64)
        return self.head(x) + self.table(none).sum(dim=1)


def test_parameters_without_a_number_are_no_obstacle(tmp_path):
    model = train(tmp_path / "run", Plain(EmptyTable().double()), audit=1)
    store = HDF5Store.open(tmp_path / "run")
    assert store.recipe.block_names == {"net.head.weight", "net.head.bias"}
    assert not store.recipe.left_out
    assert all(audit.explained_in_all() > 1 - 1e-12 for audit in store.audits())
    assert attribute(store, model, data_of((D,))[:3], progress=False).values.any()


def test_lazy_parameters_are_refused_with_a_remedy():
    model = Plain(nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3)))
    with pytest.raises(ValueError, match=r"`net.0.weight` has no shape.*Pass a batch through"):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(model, loader(vectors()))
