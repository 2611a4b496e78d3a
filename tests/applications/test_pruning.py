"""Importance scores, pruning and coresets, against definitions written out sample by sample."""

import itertools

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from tda_lightning import GradientRecorder, Identity
from tda_lightning.applications import (
    AUM,
    EL2N,
    Forgetting,
    GraNd,
    LabelLoss,
    Lowest,
    SelfInfluence,
    coreset,
    loss_history,
    prune,
    select,
)
from tda_lightning.applications.pruning import mean_rows
from tda_lightning.results import SampleScores
from tda_lightning.stores import MemoryStore

N, EPOCHS = 13, 5


class Log(Plain):
    """A classifier that logs the logits of each visit."""

    def __init__(self, net, **settings):
        super().__init__(net, **settings)
        self.seen = {i: [] for i in range(N)}

    def training_step(self, batch, batch_idx):
        x, y, ids = batch
        with torch.no_grad():
            for i, logits in zip(ids.tolist(), self.net(x), strict=True):
                self.seen[i].append(logits)
        return self.loss(self.net(x), y)


@pytest.fixture(scope="module", params=[2, 3, 7], ids="{} classes".format)
def trained(request):
    torch.manual_seed(2)
    x, y = torch.randn(N, 5).double(), torch.randint(request.param, (N,))
    model = Log(
        nn.Linear(5, request.param).double(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    store = MemoryStore()
    data = TensorDataset(x, y, torch.arange(N))
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, max_epochs=EPOCHS, precision="64-true").fit(model, loader(data, 3))
    return store, model.seen, y


def error(logits, label):
    return float((logits.softmax(0) - nn.functional.one_hot(label, len(logits))).norm())


def loss(logits, label):
    return float(nn.functional.cross_entropy(logits, label))


def margin(logits, label):
    return float(logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).max())


@pytest.mark.parametrize(
    ("importance", "of_visit"),
    [(EL2N(), error), (LabelLoss(), loss), (AUM(), lambda *visit: -margin(*visit))],
    ids=["EL2N", "LabelLoss", "AUM"],
)
def test_scores_are_means_of_their_definition_for_any_number_of_classes(
    trained, importance, of_visit
):
    store, seen, y = trained
    expected = [sum(of_visit(v, y[i]) for v in visits) / EPOCHS for i, visits in seen.items()]
    assert importance.scores(store).values.tolist() == pytest.approx(expected, rel=1e-5)


def test_forgetting_counts_the_changes_from_right_to_wrong_predictions(trained):
    store, seen, y = trained
    right = [[margin(v, y[i]) > 0 for v in visits] for i, visits in seen.items()]
    counts = [sum(a and not b for a, b in itertools.pairwise(visits)) for visits in right]
    expected = [c if any(r) else max(counts) + 1 for c, r in zip(counts, right, strict=True)]
    assert Forgetting().scores(store).values.tolist() == expected


def test_grand_is_the_mean_norm_of_the_gradient_in_the_first_epochs(trained):
    store, _, _ = trained
    norms = {i: [] for i in range(N)}
    for step in store:
        for i, row, weight in zip(step.sample_ids.tolist(), step.sketch, step.weights, strict=True):
            if step.epoch < 2:
                norms[i].append(float(row.norm() / weight))
    expected = torch.tensor([sum(values) / 2 for values in norms.values()])
    torch.testing.assert_close(GraNd(epochs=2).scores(store).values.float(), expected)


@pytest.mark.parametrize("importance", [EL2N(), GraNd(), SelfInfluence()], ids=repr)
def test_pruning_keeps_the_highest_and_its_reverse_the_lowest(trained, importance):
    store, _, _ = trained
    scores = importance.scores(store)
    highest, lowest = (prune(store, 7 / N, importance=i) for i in (importance, Lowest(importance)))
    assert highest.ids.tolist() == scores.highest(7).ids.tolist()
    assert lowest.ids.tolist() == scores.lowest(7).ids.tolist()
    assert highest.weights.tolist() == [1.0] * 7
    assert prune(store, 7 / N, importance=scores).ids.tolist() == highest.ids.tolist()


def test_balanced_pruning_keeps_the_same_share_of_each_class(trained):
    store, _, y = trained
    half = prune(store, 6 / N, balance=y)
    for label in y.unique():
        share = float((y[half.ids] == label).sum()) / float((y == label).sum())
        assert abs(share - 6 / N) <= 1 / float((y == label).sum())
    assert len(half) == 6
    assert half.scores.tolist() == sorted(half.scores.tolist(), reverse=True)
    names = [f"class {label}" for label in y.tolist()]
    assert prune(store, 6 / N, balance=names).ids.tolist() == half.ids.tolist()


def test_a_selection_goes_straight_into_torch(trained):
    store, _, y = trained
    chosen = coreset(store, 5 / N, balance=y)
    data = TensorDataset(torch.arange(N))
    sampler = WeightedRandomSampler(chosen.weights, len(chosen))
    drawn = torch.cat(
        [batch[0] for batch in DataLoader(Subset(data, chosen.ids), 2, sampler=sampler)]
    )
    assert set(drawn.tolist()) <= set(chosen.ids.tolist())
    assert list(chosen.to_pandas().index) == chosen.ids.tolist()
    assert f"Selection of 5 of {N} samples" in repr(chosen)


def test_selected_samples_with_suspicious_labels_are_counted():
    """Hard samples are kept, and wrong labels are hard; the easiest half holds none of them."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 2), torch.arange(60) % 2
    x[:, 0] += torch.where(y == 1, 5.0, -5.0)
    y[:7] = 1 - y[:7]
    store = MemoryStore()
    net = nn.Linear(2, 2)
    model = Plain(net, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = loader(TensorDataset(x, y))
    quiet_trainer(GradientRecorder(store), max_epochs=8).fit(model, data)
    assert set(range(7)) <= set(prune(store).ids.tolist())
    note = "About 7 labels of the data look wrong, and 7 of these samples are selected."
    assert note in repr(prune(store))
    assert not prune(store, importance=Lowest(EL2N())).notes
    assert "7 labels" in repr(coreset(store, 0.5))


def test_a_coreset_is_the_greedy_facility_location(trained):
    store, _, _ = trained
    ids, rows = mean_rows(store)
    cosines = nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)

    def coverage(chosen):
        return float(cosines[chosen].amax(dim=0).sum()) if chosen else -float(N)

    greedy = []
    for _ in range(5):
        greedy.append(max(set(range(N)) - set(greedy), key=lambda i: coverage([*greedy, i])))
    chosen = coreset(store, 5 / N)
    at = torch.searchsorted(ids, chosen.ids).tolist()
    for m in range(1, 6):  # several choices may tie
        assert coverage(at[:m]) == pytest.approx(coverage(greedy[:m]))
    sizes = torch.bincount(cosines[at].argmax(dim=0), minlength=5)
    torch.testing.assert_close(chosen.weights.float(), sizes * 5 / N)
    assert float(chosen.weights.mean()) == pytest.approx(1)


@pytest.mark.parametrize("keep", [0.0, 1.5, 0.001])
def test_a_share_that_keeps_nothing_is_refused(trained, keep):
    with pytest.raises(ValueError, match="expected a share of the 13 samples"):
        prune(trained[0], keep)


def test_wrong_labels_and_scores_are_refused(trained):
    store, _, y = trained
    with pytest.raises(ValueError, match="a whole number or a name for every id up to 12"):
        prune(store, balance=y[:7])
    with pytest.raises(ValueError, match="`balance` has fractions"):
        prune(store, balance=y / 2)
    nan = SampleScores(torch.full((N,), torch.nan), torch.arange(N), "")
    with pytest.raises(ValueError, match="holds NaN"):
        prune(store, importance=nan)


class HardestHalf(Log):
    """Learns from the harder half of each batch, and logs the visits that count."""

    def training_step(self, batch, batch_idx):
        x, y, ids = batch
        losses = nn.functional.cross_entropy(self.net(x), y, reduction="none")
        chosen = losses.topk(len(x) // 2).indices
        for i, logits in zip(ids[chosen].tolist(), self.net(x[chosen]).detach(), strict=True):
            self.seen[i].append(logits)
        return losses[chosen].mean()


def test_visits_without_weight_do_not_count():
    torch.manual_seed(2)
    x, y = torch.randn(N, 5).double(), torch.randint(3, (N,))
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model = HardestHalf(net, optimizer=lambda p: torch.optim.SGD(p, lr=3.0))
    store, data = MemoryStore(), TensorDataset(x, y, torch.arange(N))
    trainer = quiet_trainer(GradientRecorder(store), max_epochs=12, precision="64-true")
    trainer.fit(model, loader(data, 6))
    for importance, of in ((EL2N(), error), (LabelLoss(), loss)):
        visits = [[of(each, y[i]) for each in seen] for i, seen in model.seen.items()]
        means = [sum(each) / max(len(each), 1) for each in visits]
        assert importance.scores(store).values.tolist() == pytest.approx(means, rel=1e-5)
        assert len(prune(store, importance=importance).ids) == 6
    right = [[margin(each, y[i]) > 0 for each in seen] for i, seen in model.seen.items()]
    counts = [sum(a and not b for a, b in itertools.pairwise(each)) for each in right]
    most = max(counts)
    expected = [
        most + 1 if seen and not any(seen) else count
        for seen, count in zip(right, counts, strict=True)
    ]
    assert most > 0
    assert Forgetting().scores(store).values.tolist() == expected
    history = loss_history(store)
    assert history.forgetting().values.tolist() == counts
    shares = [sum(each) / len(each) if each else float("nan") for each in right]
    correctness = history.correctness().values.tolist()
    assert correctness == pytest.approx(shares, nan_ok=True)
    assert history.learned().tolist() == [bool(each) and each[-1] for each in right]


def test_a_regression_has_no_label_probabilities():
    store = MemoryStore()
    data = TensorDataset(torch.randn(7, 3), torch.randn(7, 1))
    model = Plain(nn.Linear(3, 1), nn.functional.mse_loss)
    quiet_trainer(GradientRecorder(store)).fit(model, loader(data, 3))
    with pytest.raises(ValueError, match=r"Pass `importance=LabelLoss\(\)`"):
        prune(store)
    assert len(prune(store, importance=GraNd())) == len(prune(store, importance=LabelLoss())) == 4


@pytest.mark.parametrize(
    "choose",
    [
        lambda run, model, batch: prune(run, 6 / 13, importance=Lowest(EL2N())),
        lambda run, model, batch: prune(run, 6 / 13, importance=Forgetting()),
        lambda run, model, batch: coreset(run, 6 / 13),
        lambda run, model, batch: select(run, model, batch, n=6, progress=False),
        lambda run, model, batch: select(run, model, batch, n=6, redundancy=9.0, progress=False),
    ],
    ids=["lowest", "forgetting", "coreset", "select", "redundancy"],
)
def test_samples_that_were_never_drawn_come_last(choose):
    store, model = MemoryStore(), Plain(nn.Linear(5, 3))
    data = TensorDataset(torch.randn(N, 5), torch.arange(N) % 3)
    trainer = quiet_trainer(GradientRecorder(store), max_epochs=4, limit_train_batches=2)
    trainer.fit(model, DataLoader(data, 2))
    selection = choose(store, model, data[:3])
    assert set(selection.ids[:4].tolist()) == {0, 1, 2, 3}
    assert "9 samples were never drawn" in repr(selection)
    assert "2 of them are selected" in repr(selection)
