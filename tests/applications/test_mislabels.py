"""Wrong labels are found, counted, and described in the columns that cleanlab uses."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from recorded_digits import DigitsModel, recorded_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from unchecked_calls import type_checks_disabled

from tda_lightning import GradientRecorder, LossRecorder
from tda_lightning.applications import Retrainings, find_mislabeled, loss_history, retrain
from tda_lightning.applications.loss_history import LossHistory
from tda_lightning.applications.mislabel_count import best_split, decisive_part, estimate_number
from tda_lightning.metrics import mislabel_auc
from tda_lightning.stores import MemoryStore


@pytest.fixture(scope="module")
def suspects():
    digits = recorded_digits()
    return find_mislabeled(
        digits.store, digits.model, digits.loader(), trusted=digits.queries(50), progress=False
    )


def test_the_run_alone_finds_and_counts_wrong_labels():
    digits = recorded_digits()
    found = find_mislabeled(digits.store, progress=False)
    assert mislabel_auc(-found.label_scores, digits.wrong) > 0.95
    assert found.estimated_number == pytest.approx(30, abs=6)
    assert (
        found.ids.tolist()
        == found.train_ids[found.label_scores.argsort()[: len(found.ids)]].tolist()
    )
    assert set(found.witnesses) == {"loss", "self_influence", "left_out_loss"}
    assert "witnesses: loss, self_influence, left_out_loss" in repr(found)


def test_label_scores_are_geometric_means_over_the_decisive_visits(suspects):
    history = loss_history(recorded_digits().store)
    p = {int(i): [] for i in suspects.train_ids}
    for sample, loss in zip(history.sample_ids.tolist(), history.losses, strict=True):
        p[sample].append(-loss)
    logs = torch.stack([torch.stack(values) for values in p.values()])

    def separation(end):
        return best_split((-logs[:, :end].mean(dim=1)).pow(0.75))[1]

    best = max(range(5, logs.shape[1] + 1), key=separation)
    best = best if separation(best) >= 0.68 else logs.shape[1]
    assert decisive_part(history).max_visits() == best
    torch.testing.assert_close(suspects.label_scores, logs[:, :best].mean(dim=1).exp())


def store_of_late_samples():
    """Losses of most samples fall at once, those of the first 13 at the fifth of eleven visits."""
    store, noise = MemoryStore(), torch.Generator().manual_seed(0)
    trained, model = MemoryStore(), Plain(mlp())
    quiet_trainer(LossRecorder(trained), max_epochs=11).fit(model, DataLoader(vectors(n=101), 101))
    store.begin(trained.recipe)
    for step in trained:
        late = torch.where(step.sample_ids < 13, 3.0 if step.epoch < 5 else 0.0, 0.1)
        losses = late + 0.1 * torch.rand(101, generator=noise)
        store.append(replace(step, losses=losses, margins=1 - losses))
    return store, model


@pytest.mark.parametrize(
    ("epochs", "untrained", "unlearned", "doubt"),
    [
        (11, 2.0, 0, ""),
        (11, 4.0, 0, "they are learned late, but not contradicted"),
        (11, 2.0, 33, "The model has learned only 62% of the other samples"),
        (2, 2.0, 0, "No sample came 3 times"),
    ],
    ids=["contradicted", "learned late", "others unlearned", "two visits"],
)
def test_only_contradicted_labels_of_a_model_that_fits_the_others_are_counted(
    epochs, untrained, unlearned, doubt
):
    """All samples have the loss of a guess first; later, 13 keep one of 3, the others fall."""
    store, trained = MemoryStore(), store_of_late_samples()[0]
    store.begin(trained.recipe)
    for step in trained[:epochs]:
        losses = torch.where(step.sample_ids < 13, 3.0, 0.1 + step.sample_ids / 1e4)
        margins = torch.where(step.sample_ids < 13 + unlearned, -1.0, 1.0)
        losses = torch.full((101,), untrained) if step.index == 0 else losses
        store.append(replace(step, losses=losses, margins=margins))
    found = find_mislabeled(store, progress=False)
    assert found.is_clear == (not doubt)
    assert doubt in " ".join(repr(found).split())
    if not doubt:
        assert sorted(found.ids.tolist()) == list(range(13))


def test_memorized_labels_are_counted_by_the_visits_before():
    store, _ = store_of_late_samples()
    found = find_mislabeled(store, progress=False)
    assert sorted(found.ids.tolist()) == list(range(13))
    assert found.is_clear
    assert "first 5 of 11 visits" in repr(found)
    assert "Samples of a rare class are learned late" in repr(found)


@pytest.mark.parametrize("n_rare", [13, 30])
def test_a_class_that_is_flagged_as_a_whole_makes_the_number_unknown(n_rare):
    """A rare class is learned late, as are wrong labels; the losses do not tell them apart."""
    store, model = store_of_late_samples()
    labels = (torch.arange(101) < n_rare).long()
    data = DataLoader(TensorDataset(vectors(n=101).tensors[0], labels), 50)
    found = find_mislabeled(
        store, model, data, outputs=lambda module, batch: module.net(batch[0]), progress=False
    )
    assert sorted(found.ids.tolist()) == list(range(13))
    assert found.is_clear == (n_rare == 30)
    assert ("13 of the 13 samples with label 1 are flagged" in repr(found)) == (n_rare == 13)
    assert "rare class are learned" not in repr(found)


def test_the_frame_has_cleanlabs_columns_and_every_sample(suspects):
    digits, frame = recorded_digits(), suspects.to_pandas()
    assert {"is_label_issue", "label_score", "given_label", "predicted_label"} <= set(frame)
    labels = torch.stack([label for _, label in digits.train])
    assert frame.given_label.tolist() == labels.tolist()
    assert frame.index.tolist() == digits.train.indices
    assert frame.index[frame.is_label_issue].tolist() == sorted(suspects.ids.tolist())
    with torch.no_grad():
        predicted = digits.model(torch.stack([x for x, _ in digits.train])).argmax(dim=1)
    assert frame.predicted_label.tolist() == predicted.tolist()


def test_opponents_of_trusted_data_are_a_witness(suspects):
    wrong = recorded_digits().wrong
    assert mislabel_auc(suspects.witnesses["opposition"], wrong) > 0.8
    assert suspects.agreement().max() == 4


def test_the_number_can_be_chosen():
    found = find_mislabeled(recorded_digits().store, number=7, progress=False)
    assert len(found.ids) == len(found.scores) == int(found.is_flagged().sum()) == 7


def test_a_shuffled_loader_gives_the_same_labels(suspects):
    digits = recorded_digits()
    shuffled = find_mislabeled(
        digits.store, digits.model, digits.loader(shuffle=True), progress=False
    )
    assert torch.equal(shuffled.labelled.given, suspects.labelled.given)
    assert torch.equal(shuffled.labelled.predicted, suspects.labelled.predicted)


def test_a_loader_that_misses_samples_is_refused():
    digits = recorded_digits()
    with pytest.raises(ValueError, match="does not yield sample"):
        find_mislabeled(digits.store, digits.model, digits.loader(drop_last=True), progress=False)
    with pytest.raises(ValueError, match="passed without `model`"):
        find_mislabeled(digits.store, loader=digits.loader())


@pytest.mark.parametrize("number", [-1, True, 3.5])
def test_a_number_of_samples_to_flag_is_whole(number):
    """A negative one would flag all but the last."""
    with type_checks_disabled(), pytest.raises(ValueError, match=r"`number` is .* whole number"):
        find_mislabeled(recorded_digits().store, number=number)


def test_the_loader_of_a_regression_is_refused_with_what_needs_no_classes():
    digits = recorded_digits()
    targets = TensorDataset(digits.test.tensors[0], digits.test.tensors[1].float())
    with pytest.raises(ValueError, match=r"as in a regression.*`find_mislabeled\(run\)`"):
        find_mislabeled(digits.store, digits.model, DataLoader(targets, 50), progress=False)


def test_a_loss_without_labels_leaves_self_influence_and_a_note():
    class OddLoss(Plain):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]).abs().sum(dim=1) - batch[1]).abs().mean()

    store = MemoryStore()
    quiet_trainer(GradientRecorder(store), max_epochs=2).fit(OddLoss(mlp()), loader(vectors()))
    found = find_mislabeled(store, progress=False)
    assert list(found.witnesses) == ["self_influence"]
    assert "holds no losses" in repr(found)


def test_the_best_split_has_the_largest_share_of_the_variance():
    values = torch.randn(11, generator=torch.Generator().manual_seed(4)).double()
    ordered = values.sort(descending=True).values
    shares = []
    for size in range(1, 11):
        means = torch.cat(
            [part.mean().expand(len(part)) for part in ordered.split([size, 11 - size])]
        )
        shares.append(float(means.var(unbiased=False) / ordered.var(unbiased=False)))
    size, share = best_split(values)
    assert share == pytest.approx(max(shares))
    assert size == shares.index(max(shares)) + 1
    assert best_split(torch.ones(5)) == (0, 0.0)


@pytest.mark.parametrize("margin", [-1.0, 1.0], ids=["contradicted", "predicted"])
def test_hard_samples_whose_label_was_predicted_are_not_counted(margin):
    """Of 53 samples, 13 have a high loss; their label was predicted, or it was not."""
    is_hard = torch.arange(53) < 13
    losses = torch.where(is_hard, 1.0, 0.05).double().repeat_interleave(3)
    margins = torch.where(is_hard, margin, 5.0).double().repeat_interleave(3)
    visits = torch.arange(3).repeat(53)
    ids = torch.arange(53).repeat_interleave(3)
    history = LossHistory(ids, visits, visits, losses, margins, torch.arange(53), "cross-entropy")
    count = estimate_number(history.mean().values, history, history)
    assert count.number == (13 if margin < 0 else 0)


def test_clean_labels_are_said_not_to_fall_in_two_groups():
    store = MemoryStore()
    x, _ = vectors(n=101).tensors
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    model = Plain(mlp(classes=2), functional.cross_entropy)
    quiet_trainer(GradientRecorder(store), max_epochs=10).fit(model, loader(data))
    found = find_mislabeled(store, progress=False)
    assert found.estimated_number <= 5


def squares(outputs, targets):
    return functional.mse_loss(outputs[:, 0], targets)


def tokens(outputs, targets):
    logits = outputs[:, :, None].expand(-1, -1, 2)
    return functional.cross_entropy(logits, targets[:, None].expand(-1, 2))


@pytest.mark.parametrize(
    ("n", "targets", "loss", "note"),
    [
        (2, lambda y: y, functional.cross_entropy, "2 samples are too few to count"),
        (53, lambda y: 0 * y, functional.cross_entropy, "All samples have the same score"),
        (53, lambda y: y.float(), squares, "tested for classes only"),
        (53, lambda y: y, tokens, "mean of several terms"),
    ],
    ids=["two samples", "one class", "regression", "tokens"],
)
def test_what_cannot_be_found_or_counted_is_stated(n, targets, loss, note):
    x, y = vectors(n=n).tensors
    data = torch.utils.data.TensorDataset(x, targets(y))
    model = Plain(mlp(classes=1 if "same score" in note else 3), loss)
    store = MemoryStore()
    quiet_trainer(LossRecorder(store)).fit(model, loader(data))
    found = find_mislabeled(store, progress=False)
    assert not found.is_clear
    assert "no clear group" in repr(found)
    assert note in repr(found)
    assert ("rare class" in repr(found)) == (loss is not squares)


@pytest.mark.slow
def test_retraining_without_flagged_labels_helps_more_than_without_random_ones():
    digits = recorded_digits()
    images, labels = (torch.stack(list(column)) for column in zip(*digits.train, strict=True))
    train, store = TensorDataset(images, labels), MemoryStore()
    trainer = quiet_trainer(LossRecorder(store), max_epochs=12)
    trainer.fit(DigitsModel(), DataLoader(train, 47, shuffle=True))

    def test_losses(model):
        x, y = digits.queries(200)
        return functional.cross_entropy(model.net(x), y, reduction="none")

    ground_truth = partial(
        retrain,
        model=DigitsModel,
        loader=lambda: DataLoader(train, 47, shuffle=True),
        trainer=lambda: quiet_trainer(max_epochs=12),
        measure=test_losses,
        progress=False,
    )
    mislabeled = find_mislabeled(store, retrain=ground_truth, progress=False)
    flagged, random = (values[-1] for values in mislabeled.removal.changes.values())
    assert flagged < min(0, random)
    assert f"measured mean changes by {flagged:+.3g}" in repr(mislabeled)


def test_samples_below_a_subset_are_removed_at_their_positions():
    digits, plans = recorded_digits(), []

    def record_plan(plan):
        plans.append(plan)
        return Retrainings(plan, torch.zeros(len(plan), 2))

    mislabeled = find_mislabeled(
        digits.store, digits.model, digits.loader(), retrain=record_plan, progress=False
    )
    removed = (plans[0].weights[3] == 0).nonzero()[:, 0]
    assert {digits.train.indices[i] for i in removed} == set(mislabeled.ids.tolist())
    with pytest.raises(ValueError, match="no positions in the training data"):
        find_mislabeled(digits.store, retrain=record_plan, progress=False)
