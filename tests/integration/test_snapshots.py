"""Snapshots: weights stored before chosen steps, and queries at these weights."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import (
    ContributionTracker,
    GradientRecorder,
    GradientSimilarity,
    HDF5Store,
    Identity,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
    add_snapshots,
    attribute,
    top_attributions,
    trajectory,
)
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def double_vectors(n=13):
    x, y = vectors(n).tensors
    return TensorDataset(x.double(), y)


def record(store, *callbacks, optimizer=OPTIMIZERS["SGD"], snapshots=0, **settings):
    model = Plain(mlp().double(), optimizer=optimizer)
    recorder = GradientRecorder(store, projector=Identity(), snapshots=snapshots)
    trainer = quiet_trainer(recorder, *callbacks, precision="64-true", **settings)
    trainer.fit(model, loader(double_vectors()))
    return model


def queries():
    return double_vectors(18)[13:]


def cloned_state(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same_state(model, state):
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tracin_at_snapshots_of_every_step_is_the_sum_of_exact_products(optimizer, tmp_path):
    tracker = ContributionTracker(queries(), tmp_path / "probe.npz")
    store = HDF5Store(tmp_path / "run", storage="as computed")
    model = record(store, tracker, optimizer=OPTIMIZERS[optimizer], snapshots=1, max_epochs=9)
    scores = attribute(tmp_path / "run", model, queries(), method=TracIn(), at="snapshots")
    torch.testing.assert_close(scores.values, tracker.scores.values, rtol=1e-8, atol=1e-12)
    assert scores.provenance["weights"] == "the nearest of 27 snapshots, steps 0 to 26"


def test_tracin_at_snapshots_of_every_step_predicts_the_loss_change_of_small_steps():
    store = MemoryStore()
    model = record(store, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4), snapshots=1)
    after, (x, y) = cloned_state(model), queries()

    def losses(weights):
        model.load_state_dict(weights)
        with torch.no_grad():
            return functional.cross_entropy(model.net(x), y, reduction="none")

    change = losses(store.weights_at(0)) - losses(after)
    scores = attribute(store, model, queries(), method=TracIn(), at="snapshots")
    torch.testing.assert_close(scores.values.sum(dim=1), change, rtol=5e-3, atol=1e-9)


def test_each_step_is_queried_at_its_nearest_snapshot():
    store = MemoryStore()
    model = record(store, snapshots=[1, 4])
    assert store.snapshots() == [1, 4]
    expected = torch.zeros(5, 13, dtype=torch.float64)
    for index, steps in ((1, store[:3]), (4, store[3:])):
        model.load_state_dict(store.weights_at(index))
        rows = record_queries(model, queries(), like=store, at=index)
        expected += TracIn().attribute(steps, rows).values
    scores = attribute(store, model, queries(), method=TracIn(), at="snapshots")
    torch.testing.assert_close(scores.values, expected)
    half = attribute(store[3:], model, queries(), method=TracIn(), at="snapshots")
    assert half.provenance["weights"] == "the nearest of 1 snapshots, steps 4 to 4"


def test_snapshots_are_the_weights_before_their_step():
    store, log = MemoryStore(), TrainingLog()
    record(store, log, snapshots=2, accumulate_grad_batches=2, max_epochs=3)
    assert store.snapshots() == [0, 2, 4]
    for index, batch in ((0, 0), (2, 3), (4, 6)):
        for name, weight in store.weights_at(index).items():
            assert torch.equal(weight, log.weights[batch][name])


@pytest.mark.parametrize(
    ("snapshots", "settings", "estimate"),
    [
        (2, {}, "; about 3 of them, 0.0 MiB"),
        (4, {"max_steps": 5}, "; about 2 of them, 0.0 MiB"),
        ([1, 4, 6], {}, "; about 2 of them, 0.0 MiB"),
        (2, {"max_epochs": -1, "max_time": "00:00:00:01"}, "; an unknown number of them"),
    ],
    ids=repr,
)
def test_the_size_of_snapshots_is_estimated_before_training(snapshots, settings, estimate, caplog):
    store = MemoryStore()
    with caplog.at_level("INFO"):
        record(store, snapshots=snapshots, **settings)
    assert f"Snapshots of the weights take 0.0 MiB each{estimate}" in caplog.text
    if "max_time" not in settings:
        assert f"about {len(store.snapshots())} of them" in caplog.text
    caplog.clear()
    record(MemoryStore())
    assert "Snapshots of the weights" not in caplog.text


@pytest.mark.parametrize("method", [TracIn(), Source()], ids=repr)
def test_queries_at_a_step_use_the_weights_of_its_snapshot(method):
    store = MemoryStore()
    model = record(store, optimizer=OPTIMIZERS["Adam"], snapshots=3)
    state = cloned_state(model)
    scores = attribute(store, model, queries(), method=method, at=3)
    assert_same_state(model, state)
    model.load_state_dict(store.weights_at(3))
    rows = record_queries(model, queries(), like=store, at=3)
    torch.testing.assert_close(scores.values, method.attribute(store, rows).values)
    assert scores.provenance["weights"] == "the snapshot before step 3"


@pytest.mark.parametrize("at", [4, "snapshots"])
def test_trajectories_and_top_scores_at_snapshots_are_parts_of_all_scores(at):
    store, chosen = MemoryStore(), [7, 0, 12]
    model = record(store, optimizer=OPTIMIZERS["Adam"], snapshots=2, max_epochs=3)
    state = cloned_state(model)
    settings = {"method": TracIn(), "at": at, "progress": False}
    scores = attribute(store, model, queries(), **settings)
    scores_now = attribute(store, model, queries(), method=TracIn(), progress=False)
    assert not torch.allclose(scores.values, scores_now.values, rtol=1e-3)
    over_time = trajectory(store, model, queries(), chosen, **settings)
    torch.testing.assert_close(over_time.total(), scores.values[:, chosen])
    assert over_time.times.tolist() == list(range(9))
    for query_batch_size in (2, 256):
        top = top_attributions(
            store, model, queries(), 3, query_batch_size=query_batch_size, **settings
        )
        torch.testing.assert_close(top.proponents.values, scores.proponents(3).values)
        assert torch.equal(top.opponents.ids, scores.opponents(3).ids)
        assert (top.method, top.provenance) == (scores.method, scores.provenance)
    assert_same_state(model, state)


@pytest.mark.parametrize(
    "method", [InfluenceFunction(), Unrolled(), Source(), GradientSimilarity("dot")], ids=repr
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_methods_average_over_the_later_two_thirds(method, optimizer):
    store = MemoryStore()
    model = record(store, optimizer=OPTIMIZERS[optimizer], snapshots=2, max_epochs=3)
    assert (len(store), store.snapshots()) == (9, [0, 2, 4, 6, 8])
    settings = {"method": method, "progress": False}
    scores = attribute(store, model, queries(), at="snapshots", **settings)
    each = [attribute(store, model, queries(), at=step, **settings).values for step in (4, 6, 8)]
    torch.testing.assert_close(scores.values, torch.stack(each).mean(dim=0))
    assert scores.provenance["weights"] == "the mean of 3 snapshots, steps 4 to 8"
    late_scores = attribute(
        store[3:], model, queries(), at="snapshots", method=TracIn(), progress=False
    )
    assert late_scores.provenance["weights"] == "the nearest of 4 snapshots, steps 2 to 8"


def test_at_most_ten_snapshots_are_averaged():
    store = MemoryStore()
    model = record(store, snapshots=1, max_epochs=11)
    assert len(store) == 33
    steps = [12, 14, 16, 18, 20, 23, 25, 27, 29, 31]  # of 11 to 32
    rows = []
    for index in steps:
        model.load_state_dict(store.weights_at(index))
        rows.append(record_queries(model, queries(), like=store, at=index))
    scores = attribute(store, model, queries(), method=Source(), at="snapshots")
    expected = Source().attribute(store, torch.stack(rows).mean(dim=0))
    torch.testing.assert_close(scores.values, expected.values)
    assert scores.provenance["weights"] == "the mean of 10 snapshots, steps 12 to 31"


def test_several_runs_are_each_queried_at_their_own_snapshots():
    stores = [MemoryStore(), MemoryStore()]
    models = [record(store, snapshots=n) for store, n in zip(stores, (2, 3), strict=True)]
    settings = {"method": TracIn(), "at": "snapshots", "progress": False}
    pairs = zip(stores, models, strict=True)
    each = [attribute(*pair, queries(), **settings).values for pair in pairs]
    averaged = attribute(stores, models, queries(), **settings)
    torch.testing.assert_close(averaged.values, (each[0] + each[1]) / 2)


def test_trainer_checkpoints_can_be_added_as_snapshots(tmp_path):
    for name, snapshots in (("with", 2), ("without", 0)):
        pl.seed_everything(5, verbose=False)
        saved = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1)
        store = HDF5Store(tmp_path / f"{name}.tda")
        model = record(store, saved, snapshots=snapshots, enable_checkpointing=True)
    files = sorted((tmp_path / "without").glob("*.ckpt"))
    add_snapshots(tmp_path / "without.tda", files)
    recorded, added = (HDF5Store.open(tmp_path / f"{name}.tda") for name in ("with", "without"))
    assert (recorded.snapshots(), added.snapshots()) == ([0, 2, 4], [2, 4, 6])
    for name, weight in recorded.weights_at(4).items():
        assert torch.equal(weight, added.weights_at(4)[name])
    assert attribute(added, model, queries(), at=6).values.shape == (5, 13)
    assert recorded.size_on_disk > 3 * sum(8 * p.numel() for p in model.parameters())


def test_training_is_bit_identical_with_snapshots():
    def weights(*callbacks):
        pl.seed_everything(5, verbose=False)
        model = Plain(torch.nn.Sequential(mlp(), torch.nn.Dropout(0.2)))
        quiet_trainer(*callbacks).fit(model, loader(vectors()))
        return list(model.parameters())

    recorder = GradientRecorder(MemoryStore(), snapshots=1)
    pairs = zip(weights(), weights(recorder), strict=True)
    assert all(torch.equal(plain, recorded) for plain, recorded in pairs)


def test_queries_without_the_needed_snapshots_raise():
    store, bare, early = MemoryStore(), MemoryStore(), MemoryStore()
    model = record(store, snapshots=2)
    record(bare)
    record(early, snapshots=[0, 1])
    with pytest.raises(ValueError, match="no snapshot of the weights before step 3; expected one"):
        attribute(store, model, queries(), at=3)
    with pytest.raises(ValueError, match="no snapshots in its last two thirds, steps 2 to 6; exp"):
        attribute(early, model, queries(), method=Source(), at="snapshots")
    with pytest.raises(ValueError, match="has no snapshots; expected at least one"):
        attribute(bare, model, queries(), method=TracIn(), at="snapshots")
    with pytest.raises(ValueError, match="has no snapshots; expected at least one"):
        trajectory(bare, model, queries(), [0], at="snapshots")
    with pytest.raises(ValueError, match="no snapshot of the weights before step 3; expected one"):
        top_attributions(store, model, queries(), at=3)
    with pytest.raises(ValueError, match="do not fit the `Plain`"):
        attribute(store, Plain(mlp(d=5).double()), queries(), at=2)


def shuffled(data):
    chance = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*data), batch_size=3, shuffle=True, generator=chance)


@pytest.mark.parametrize("method", [TracIn(), InfluenceFunction()], ids=lambda m: type(m).__name__)
def test_a_shuffling_query_loader_has_one_order_at_all_snapshots(method):
    store = MemoryStore()
    model, data = record(store, snapshots=1), queries()
    scores = attribute(store, model, shuffled(data), method=method, at="snapshots", progress=False)
    in_order = [torch.cat(parts) for parts in zip(*shuffled(data), strict=True)]
    expected = attribute(store, model, in_order, method=method, at="snapshots", progress=False)
    torch.testing.assert_close(scores.values, expected.values)


def test_a_shuffling_query_loader_has_one_order_in_all_runs():
    stores = [MemoryStore(), MemoryStore()]
    models, data = [record(store) for store in stores], queries()
    scores = attribute(stores, models, shuffled(data), progress=False)
    in_order = [torch.cat(parts) for parts in zip(*shuffled(data), strict=True)]
    torch.testing.assert_close(
        scores.values, attribute(stores, models, in_order, progress=False).values
    )


def test_snapshots_after_the_last_recorded_step_of_a_stride_belong_to_the_run():
    store = MemoryStore()
    model = Plain(mlp().double())
    recorder = GradientRecorder(store, projector=Identity(), snapshots=[5], every_n_steps=4)
    quiet_trainer(recorder, precision="64-true").fit(model, loader(double_vectors()))
    assert [step.index for step in store] == [0, 4]
    scores = attribute(store, model, queries(), at="snapshots", progress=False)
    assert scores.provenance["weights"] == "the mean of 1 snapshots, steps 5 to 5"


class Scaling(Plain):
    """Changes its batch in place."""

    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


def test_a_training_step_may_overwrite_its_batch():
    store, data = MemoryStore(), double_vectors()
    model = Scaling(mlp().double())
    recorder = GradientRecorder(store, projector=Identity(), snapshots=1)
    trainer = quiet_trainer(recorder, precision="64-true")
    trainer.fit(model, DataLoader(data, 5, collate_fn=copied))
    batches = DataLoader(TensorDataset(*queries()), batch_size=3, collate_fn=copied)
    scores = attribute(store, model, batches, at="snapshots", progress=False)
    halved = (queries()[0] * 0.5, queries()[1])
    plain = Plain(model.net)
    expected = attribute(store, plain, halved, at="snapshots", progress=False)
    torch.testing.assert_close(scores.values, expected.values)


def copied(samples):
    inputs, labels = zip(*samples, strict=True)
    return [torch.stack(inputs).clone(), torch.stack(labels)]
