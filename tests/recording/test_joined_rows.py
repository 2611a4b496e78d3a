"""Rows that only their order assigns to samples are warned of."""

import warnings

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer, vectors
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from tda_lightning import GradientRecorder, Identity, TracIn, attribute
from tda_lightning.stores import MemoryStore

N, T, D = 5, 11, 3


class Windows(Plain):
    """Draws windows from the series of a batch in its training step, as forecasting models do."""

    def __init__(self, shuffled=True):
        super().__init__(nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, 1)))
        self.shuffled = shuffled

    def windows(self, series):
        windows = series.unfold(1, D + 1, 1).flatten(0, 1)
        return windows[torch.randperm(len(windows))] if self.shuffled else windows

    def training_step(self, batch, batch_idx):
        windows = self.windows(batch[0])
        return nn.functional.mse_loss(self.net(windows[:, :D]), windows[:, D:])


class Hidden(Windows):
    """Draws them where nothing shows which samples they hold."""

    def windows(self, series):
        return torch.from_numpy(super().windows(series).numpy())


class Whole(Plain):
    """Sees the positions of each series on an axis behind that of the series."""

    def __init__(self):
        super().__init__(nn.Linear(1, 1))

    def training_step(self, batch, batch_idx):
        series = batch[0][:, :, None]
        outputs = self.net(series[:, :-1])
        return nn.functional.mse_loss(outputs.flatten(0, 1), series[:, 1:].flatten(0, 1))


class TwoViews(Plain):
    """Sees two views of a batch, one below the other."""

    def __init__(self):
        super().__init__(nn.Linear(T, 2))

    def training_step(self, batch, batch_idx):
        views = torch.cat([batch[0], batch[0] + 0.1])
        return self.net(views).square().mean()


def series():
    return TensorDataset(torch.randn(10, T, generator=torch.Generator().manual_seed(0)))


def warnings_of(model, batch_size=N, **settings):
    recorder = GradientRecorder(MemoryStore(), **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(recorder).fit(model, loader(series(), batch_size=batch_size))
    return [str(w.message) for w in caught if "rows per sample" in str(w.message)]


def test_windows_that_cannot_be_followed_are_warned_of_once():
    (message,) = warnings_of(Hidden())
    assert f"an axis of {N} entries" in message
    assert f"{T - D} rows per sample" in message


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Whole(), {}),
        (TwoViews(), {}),
        (Windows(), {}),
        (Hidden(), {"batch_size": 1}),
        (Hidden(shuffled=False), {"batch_dims": {"*": "flattened"}}),
    ],
    ids=["an axis of samples", "two views", "followed", "one sample", "declared"],
)
def test_other_rows_are_not_warned_of(model, settings):
    assert not warnings_of(model, **settings)


class DrawnWindows(Windows):
    """Draws some of the windows in each step, and notes the gradient of each sample."""

    def __init__(self):
        super().__init__()
        self.double()
        self.rows = []

    def training_step(self, batch, batch_idx):
        series = batch[0].double()
        windows = series.unfold(1, D + 1, 1).flatten(0, 1)
        drawn = torch.randperm(len(windows))[: 4 * len(series)]
        windows = windows[drawn]
        losses = (self.net(windows[:, :D]) - windows[:, D:]).square().flatten()
        owners = drawn // (len(series[0]) - D)
        by_sample = losses.new_zeros(len(series)).index_add(0, owners, losses) / len(losses)
        bias = self.net[2].bias
        of = [torch.autograd.grad(each, bias, retain_graph=True)[0] for each in by_sample]
        self.rows.append(torch.stack(of))
        return losses.mean()


@pytest.mark.filterwarnings("ignore:.*not among .layers.")
def test_windows_that_the_step_draws_have_the_ids_of_their_series():
    store, model = MemoryStore(), DrawnWindows()
    recorder = GradientRecorder(store, projector=Identity(), layers=["net.2.bias"])
    quiet_trainer(recorder, max_epochs=3).fit(model, loader(series(), batch_size=N))
    assert len(store) == 6
    for step, rows in zip(store, model.rows, strict=True):
        torch.testing.assert_close(step.sketch, rows)


class OfCrops(MeanOfLosses):
    """Sees several crops of each sample, as its loader arranges them."""

    def __init__(self, count, are_together):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)).double())
        self.count, self.are_together = count, are_together

    def collate(self, samples):
        crops = [[(x.double() + crop, y) for x, y in samples] for crop in range(self.count)]
        rows = [*zip(*crops, strict=True)] if self.are_together else crops
        return default_collate([row for each in rows for row in each])

    def losses(self, batch):
        losses = super().losses(batch)
        if self.are_together:
            return losses.unflatten(0, (-1, self.count)).mean(1)
        return losses.unflatten(0, (self.count, -1)).mean(0)

    def training_step(self, batch, batch_idx):
        return super().losses(batch).mean()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("are_together", [True, False], ids=["together", "one batch after another"])
def test_labels_show_the_order_of_crops_that_the_loader_joins(count, are_together):
    model = OfCrops(count, are_together)
    store = assert_rows_are_gradients(model, vectors(), collate_fn=model.collate)
    in_one, in_two, alone = (
        loader(vectors(7), size, shuffle=False, collate_fn=model.collate) for size in (7, 4, 1)
    )
    first, second, by_crop = (
        attribute(store, model, each, method=TracIn(), at="model").values
        for each in (in_one, in_two, alone)
    )
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, by_crop.unflatten(0, (7, count)).mean(dim=1))


class Unlabelled(OfCrops):
    """An autoencoder, whose batches have no labels that would show the order of the crops."""

    def __init__(self):
        super().__init__(2, are_together=True)
        self.net[2] = nn.Linear(11, 7).double()

    def collate(self, samples):
        return super().collate(samples)[0]

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - batch).square().mean()


def test_two_rows_of_each_sample_whose_order_nothing_shows_are_warned_of():
    model, store = Unlabelled(), MemoryStore()
    train = loader(vectors(), collate_fn=model.collate)
    with pytest.warns(UserWarning, match="2 rows per sample instead. They are taken to be two vi"):
        quiet_trainer(GradientRecorder(store)).fit(model, train)
    with pytest.warns(UserWarning, match="Nothing shows which rows of `queries` are of one sample"):
        attribute(store, model, train, method=TracIn())
    recorder = GradientRecorder(MemoryStore(), batch_dims={"*": "flattened"})
    quiet_trainer(recorder).fit(model, train)
    attribute(recorder.store, model, train, method=TracIn())
