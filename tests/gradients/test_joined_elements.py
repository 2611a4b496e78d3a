"""A loss for each element of joined samples: nodes of graphs, points, packed tokens."""

from ast import literal_eval

import pytest
import torch
from lightning_models import loader, quiet_trainer
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity, LossRecorder, attribute
from tda_lightning.gradients.capture.tracer import Tracer
from tda_lightning.recording.origins.joined import StatedRows
from tda_lightning.stores import MemoryStore

D, CLASSES = 7, 3
RAGGED = (4, 2, 5, 3, 1, 6, 2, 2, 7, 3, 5, 1, 4)


class Sets(torch.utils.data.Dataset):
    """Sets of vectors with a label for each vector."""

    def __init__(self, sizes):
        random = torch.Generator().manual_seed(1)
        self.sets = [torch.randn(size, D, generator=random).double() for size in sizes]
        self.labels = [torch.randint(CLASSES, (size,), generator=random) for size in sizes]

    def __len__(self):
        return len(self.sets)

    def __getitem__(self, index):
        return self.sets[index], self.labels[index]


def owners_of(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def positions_of(sizes):
    return torch.cat([torch.arange(size) for size in sizes])


STATEMENTS = {
    "numbers of samples": owners_of,
    "where samples begin": lambda sizes: torch.tensor([0, *sizes]).cumsum(0),
    "lengths": torch.tensor,
    "a list of lengths": list,
    "positions": positions_of,
}


class Joined:
    """Joins a batch and states which vectors are of one sample; packs them into one row or not."""

    def __init__(self, statement=owners_of, is_packed=False):
        self.statement, self.is_packed = statement, is_packed

    def __call__(self, samples):
        vectors, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
        sizes = [len(part) for part, _ in samples]
        if self.is_packed:
            vectors, labels = vectors[None], labels[None]
        return {"x": vectors, "y": labels, "where": self.statement(sizes), "sizes": str(sizes)}


class Elements(MeanOfLosses):
    """Classifies each vector by itself and by the mean of its sample's vectors."""

    def __init__(self):
        super().__init__(nn.Identity())
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Tanh())
        self.shift, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, CLASSES)
        self.double()

    def elements(self, batch):
        """Return the loss of each vector, and the sample that it belongs to."""
        owners = owners_of(literal_eval(batch["sizes"]))
        is_same = (owners == owners[:, None]).double()
        hidden = self.first(batch["x"])
        outputs = self.head(is_same / is_same.sum(1) @ hidden + hidden * self.shift)
        flat = outputs.flatten(0, -2), batch["y"].flatten()
        return functional.cross_entropy(*flat, reduction="none"), owners

    def losses(self, batch):
        losses, owners = self.elements(batch)
        count = len(literal_eval(batch["sizes"]))
        return losses.new_zeros(count).index_add(0, owners, losses) * count / len(owners)

    def training_step(self, batch, batch_idx):
        losses, _ = self.elements(batch)
        return losses.mean()


def silent(sizes):
    """State nothing."""
    return str(sizes)


class Points(Elements):
    """Repeats the mean of a sample's vectors beside each of them, by an index."""

    def elements(self, batch):
        owners = owners_of(literal_eval(batch["sizes"]))
        hidden = self.first(batch["x"])
        total = hidden.new_zeros(int(owners[-1]) + 1, 5).index_add(0, owners, hidden)
        outputs = self.head(total[owners] + hidden * self.shift)
        return functional.cross_entropy(outputs, batch["y"], reduction="none"), owners


class MovedElements(Elements):
    """Computes on the vectors in reverse."""

    def elements(self, batch):
        owners = owners_of(literal_eval(batch["sizes"])).flip(0)
        outputs = self.head(self.first(batch["x"].flip(0)) * self.shift)
        return functional.cross_entropy(outputs, batch["y"].flip(0), reduction="none"), owners


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
@pytest.mark.parametrize("is_packed", [False, True], ids=["joined", "packed"])
@pytest.mark.parametrize("batch_size", [5, 6])
def test_rows_of_elements_are_gradients(statement, is_packed, batch_size):
    assert_rows_are_gradients(
        Elements(), Sets(RAGGED), batch_size, collate_fn=Joined(statement, is_packed)
    )


class Growing(Sets):
    """Has vectors of equal number in the first epoch only, and of the same total in each."""

    draws = 0

    def __getitem__(self, index):
        self.draws += 1
        size = 3 if self.draws <= len(self) else (1, 5, 3)[index % 3 if index < 12 else 2]
        return self.sets[index][:size], self.labels[index][:size]


def test_samples_of_equal_size_do_not_settle_the_sizes_of_later_batches():
    assert_rows_are_gradients(Elements(), Growing((5,) * 13), 13, collate_fn=Joined())


class Shortened(Sets):
    """After the first epoch, leaves samples of batches of five this many vectors."""

    draws = 0

    def __init__(self, sizes):
        super().__init__((4,) * 25)
        self.left = sizes

    def __getitem__(self, index):
        size = 4 if self.draws < len(self) else self.left[self.draws % 5]
        self.draws += 1
        return self.sets[index][:size], self.labels[index][:size]


class LossesSeen(Elements):
    """Remembers the mean loss of each sample's vectors; NaN where there are none."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        losses, owners = self.elements(batch)
        n = len(literal_eval(batch["sizes"]))
        sums = losses.detach().new_zeros(n).index_add(0, owners, losses.detach())
        self.seen.append(sums / owners.bincount(minlength=n))
        return losses.mean()


CAN_BE_EMPTY = {name: each for name, each in STATEMENTS.items() if name != "positions"}


@pytest.mark.parametrize("statement", CAN_BE_EMPTY.values(), ids=CAN_BE_EMPTY)
@pytest.mark.parametrize(
    "sizes",
    [(2, 0, 1, 2, 0), (3, 0, 4, 2, 0), (1, 0, 1, 0, 0)],
    ids=["as many vectors as samples", "more", "fewer"],
)
def test_later_batches_may_have_empty_samples(statement, sizes):
    model = LossesSeen()
    store = assert_rows_are_gradients(model, Shortened(sizes), collate_fn=Joined(statement))
    for step, losses in zip(store, model.seen, strict=True):
        torch.testing.assert_close(step.losses.double(), losses, equal_nan=True)


class MovedLater(Elements):
    """Computes on the vectors in reverse from the third batch on."""

    n_batches = 0

    def training_step(self, batch, batch_idx):
        self.n_batches += 1
        if self.n_batches > 2:
            batch = {**batch, "x": batch["x"].flip(0), "y": batch["y"].flip(0)}
        outputs = self.head(self.first(batch["x"]) * self.shift)
        return functional.cross_entropy(outputs, batch["y"])


def test_elements_that_are_moved_from_some_batch_on_are_warned_of():
    batches = loader(Sets((4, 2, 5, 3) * 6), 4, collate_fn=Joined())
    trainer = quiet_trainer(GradientRecorder(MemoryStore()), max_epochs=1)
    with pytest.warns(UserWarning, match="moves the joined elements.* in recorded batch 4"):
        trainer.fit(MovedLater(), batches)


class PartlyLabelled(Joined):
    """Only some vectors have labels: often as many as there are samples."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        m, n = len(batch["y"]), len(samples)
        chosen = torch.linspace(0, m - 1, n if m % 3 else min(m, n + 2)).long()
        return {
            **batch,
            "is_labelled": torch.zeros(m, dtype=torch.bool).index_fill(0, chosen, True),
        }


class LabelledOutputs(LossesSeen):
    """Has losses of the labelled vectors only."""

    def elements(self, batch):
        owners, chosen = owners_of(literal_eval(batch["sizes"])), batch["is_labelled"]
        outputs = self.head(self.first(batch["x"]) * self.shift)[chosen]
        return functional.cross_entropy(outputs, batch["y"][chosen], reduction="none"), owners[
            chosen
        ]


class LabelledInputs(LossesSeen):
    """Picks the labelled vectors in front of the last layer."""

    def elements(self, batch):
        owners, chosen = (
            owners_of(literal_eval(batch["sizes"])),
            batch["is_labelled"].nonzero()[:, 0],
        )
        outputs = self.head(self.first(batch["x"])[chosen] * self.shift)
        return functional.cross_entropy(outputs, batch["y"][chosen], reduction="none"), owners[
            chosen
        ]


@pytest.mark.parametrize("model", [LabelledOutputs, LabelledInputs])
@pytest.mark.parametrize("batch_size", [4, 5, 6])
def test_as_many_labelled_elements_as_samples_are_no_samples(model, batch_size):
    module, data = model(), Sets(torch.arange(25).remainder(7).add(1).tolist())
    store = assert_rows_are_gradients(module, data, batch_size, collate_fn=PartlyLabelled())
    for step, losses in zip(store, module.seen, strict=True):
        torch.testing.assert_close(step.losses.double(), losses, equal_nan=True)


@pytest.mark.parametrize("model", [LossesSeen, LabelledOutputs, LabelledInputs])
@pytest.mark.parametrize("statement", [owners_of, CAN_BE_EMPTY["where samples begin"]])
def test_loss_recorder_adds_up_the_losses_of_elements(model, statement):
    module, data = model(), Sets(torch.arange(25).remainder(7).add(1).tolist())
    store = MemoryStore()
    batches = loader(data, 6, collate_fn=PartlyLabelled(statement))
    quiet_trainer(LossRecorder(store), max_epochs=2).fit(module, batches)
    for step, losses in zip(store, module.seen, strict=True):
        torch.testing.assert_close(step.losses.double(), losses, equal_nan=True)


class FirstOfEach(Elements):
    """Has a loss of the first vector of each sample."""

    def training_step(self, batch, batch_idx):
        outputs = self.head(self.first(batch["x"]) * self.shift)[batch["where"][:-1]]
        return functional.cross_entropy(outputs, batch["y"][batch["where"][:-1]])


@pytest.mark.parametrize("recorder", [GradientRecorder, LossRecorder])
def test_one_row_that_is_picked_of_each_sample_has_a_prediction(recorder):
    batches = loader(Sets(RAGGED), 5, collate_fn=Joined(STATEMENTS["where samples begin"]))
    store = MemoryStore()
    quiet_trainer(recorder(store), max_epochs=1).fit(FirstOfEach(), batches)
    assert all(step.margins is not None and step.margins.isfinite().all() for step in store)


def test_loss_recorder_leaves_open_whose_losses_as_many_elements_as_samples_have():
    module, data, store = LossesSeen(), Shortened((2, 0, 1, 2, 0)), MemoryStore()
    batches = loader(data, 5, shuffle=False, collate_fn=Joined())
    quiet_trainer(LossRecorder(store), max_epochs=2).fit(module, batches)
    assert [step.losses is None for step in store] == [False] * 5 + [True] * 5


@pytest.mark.parametrize(
    ("model", "statement", "n_traced"),
    [(Elements, owners_of, 4), (Points, silent, 4), (MovedElements, owners_of, 4)],
    ids=["stated by the batch", "by an index of the model", "moved by the step"],
)
def test_rows_that_batches_state_are_traced_ever_more_rarely(
    model, statement, n_traced, monkeypatch
):
    traced = []
    original = Tracer.traces
    monkeypatch.setattr(Tracer, "traces", lambda *parts: traced.append(1) or original(*parts))
    data = Sets(torch.arange(25).remainder(7).add(1).tolist())
    assert_rows_are_gradients(model(), data, collate_fn=Joined(statement))
    assert len(traced) == n_traced  # of ten batches


def test_labels_in_order_state_nothing_before_a_tensor_has_named_all_samples():
    rows, elements, labels = StatedRows(), torch.rand(5, 2), torch.tensor([0, 0, 2, 3, 3])
    assert not rows.of({"x": elements, "y": labels}, 5)
    for _ in range(2):
        assert rows.of({"x": torch.rand(12, 2), "y": owners_of((3, 2, 4, 1, 2))}, 5)
    assert rows.of({"x": elements, "y": labels}, 5)[5].of_rows.tolist() == labels.tolist()


def test_labels_that_look_like_a_statement_by_chance_are_not_remembered():
    rows, views = StatedRows(), torch.rand(4, 2)  # Two views of two samples, next to one another.
    for _ in range(5):
        assert rows.of({"x": views, "y": torch.tensor([0, 0, 1, 1])}, 2)
    assert not rows.of({"x": views, "y": torch.tensor([1, 1, 1, 1])}, 2)


def test_elements_of_queries_are_known_too():
    store, model = MemoryStore(), Elements()
    joined = Joined(STATEMENTS["where samples begin"])
    quiet_trainer(GradientRecorder(store, projector=Identity())).fit(
        model, loader(Sets(RAGGED), collate_fn=joined)
    )
    queries = Sets((3, 1, 4, 5))
    together = attribute(store, model, loader(queries, 4, shuffle=False, collate_fn=joined))
    alone = attribute(store, model, loader(queries, 1, shuffle=False, collate_fn=joined))
    shares = torch.tensor([3.0, 1, 4, 5]).double()[:, None] / 13 * 4
    torch.testing.assert_close(together.values, (alone.values * shares).to(together.values))


@pytest.mark.parametrize(
    ("batch", "n"),
    [
        ({"x": torch.rand(6, 2), "y": torch.tensor([0, 2, 1, 0, 1, 2])}, 3),  # labels
        ({"x": torch.rand(6, 2), "lengths": torch.tensor([3, 2, 2])}, 3),  # of other rows
        ({"x": torch.rand(3, 2), "y": torch.tensor([0, 1, 2])}, 3),  # one row per sample
        ({"x": torch.rand(6, 2), "a": torch.tensor([3, 2, 1]), "b": torch.tensor([1, 2, 3])}, 3),
    ],
    ids=["labels", "other rows", "samples", "contradictions"],
)
def test_other_numbers_state_nothing(batch, n):
    assert not StatedRows().of(batch, n)


@pytest.mark.parametrize("batch_size", [5, 6])
def test_an_index_of_the_model_shows_the_samples_of_elements(batch_size):
    assert_rows_are_gradients(Points(), Sets(RAGGED), batch_size, collate_fn=Joined(silent))
