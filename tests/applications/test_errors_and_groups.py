"""Errors, groups, summaries and shortcuts follow from the scores of single queries."""

import pytest
import torch
from lightning_models import Plain, mlp, quiet_trainer, vectors
from recorded_digits import recorded_digits
from torch.utils.data import DataLoader, TensorDataset
from unchecked_calls import type_checks_disabled

from tda_lightning import (
    GradientRecorder,
    GradientSimilarity,
    Logit,
    Scores,
    TracIn,
    attribute,
)
from tda_lightning.applications import (
    Gap,
    MeanLoss,
    WorstGroupLoss,
    attribute_summary,
    explain_errors,
    find_shortcut,
    influence_by_group,
)
from tda_lightning.stores import MemoryStore


@pytest.fixture(scope="module")
def digits():
    return recorded_digits()


def test_every_wrong_prediction_is_explained(digits):
    loader = DataLoader(digits.test, batch_size=47, shuffle=True)
    errors = explain_errors(digits.store, digits.model, loader, k=3, progress=False)
    x, y = digits.test.tensors
    with torch.no_grad():
        predicted = digits.model(x).argmax(dim=1)
    wrong = (predicted != y).nonzero()[:, 0]
    assert sorted(errors.ids.tolist()) == wrong.tolist()
    assert errors.predicted.tolist() == predicted[errors.ids].tolist()
    queries = [x[errors.ids], y[errors.ids]]
    expected = attribute(digits.store, digits.model, queries, method=TracIn(), progress=False)
    torch.testing.assert_close(errors.scores.values, expected.values)
    frame = errors.to_pandas()
    assert len(frame) == 3 * len(wrong)
    assert frame.opponent.tolist() == errors.opponents.ids.flatten().tolist()
    assert f"{len(wrong)} of 100 predictions are wrong" in repr(errors)


def test_the_commonest_opponents_are_counted(digits):
    errors = explain_errors(
        digits.store, digits.model, DataLoader(digits.test, batch_size=50), progress=False
    )
    opponents = errors.opponents.ids.flatten().tolist()
    common = errors.common_opponents(3)
    assert [opponents.count(sample) for sample, _ in common] == [count for _, count in common]
    counts = sorted((opponents.count(sample) for sample in set(opponents)), reverse=True)
    assert [count for _, count in common] == counts[:3]


def test_data_without_errors_have_nothing_to_explain(digits):
    x, _ = digits.test.tensors
    with torch.no_grad():
        right = torch.utils.data.TensorDataset(x, digits.model(x).argmax(dim=1))
    with pytest.raises(ValueError, match="All 100 predictions are right"):
        explain_errors(digits.store, digits.model, DataLoader(right, batch_size=50))


def test_several_labels_per_sample_are_refused_with_a_way_to_choose_one(digits):
    loader = DataLoader(digits.test, batch_size=50)

    def several(batch):
        return torch.nn.functional.one_hot(batch[1], 10).float()

    with pytest.raises(ValueError, match="Of several labels per sample, choose one"):
        explain_errors(digits.store, digits.model, loader, labels=several, progress=False)


def test_groups_sum_training_samples_and_average_queries():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    scores = Scores(values, torch.arange(5), torch.arange(7), "")
    train_groups, query_groups = list("aabbaba"), [1, 0, 1, 1, 0]
    result = influence_by_group(scores, train_groups, query_groups)
    for row, query_group in enumerate(result.query_groups):
        for column, train_group in enumerate(result.train_groups):
            total = sum(
                float(values[q, i])
                for q in range(5)
                for i in range(7)
                if query_groups[q] == query_group and train_groups[i] == train_group
            )
            mean = total / query_groups.count(query_group)
            assert float(result.values[row, column]) == pytest.approx(mean, abs=1e-6)
    assert result.train_sizes.tolist() == [4, 3]
    assert result.to_pandas().loc[0, "b"] == pytest.approx(float(result.values[0, 1]))
    with pytest.raises(ValueError, match="expected 7"):
        influence_by_group(scores, train_groups[1:], query_groups)


def test_a_summary_is_the_weighted_sum_of_its_queries(digits):
    loader = DataLoader(digits.test, batch_size=47)
    groups = digits.test.tensors[1] % 2
    single = attribute(digits.store, digits.model, loader, method=TracIn(), progress=False).values
    means = [single[groups == group].mean(dim=0) for group in (0, 1)]
    x, y = digits.test.tensors
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(digits.model(x), y, reduction="none")
    worst = int(losses[groups == 1].mean() > losses[groups == 0].mean())
    for summary, expected in (
        (MeanLoss(), single.mean(dim=0)),
        (WorstGroupLoss(groups), means[worst]),
        (Gap(groups, 1, 0), means[1] - means[0]),
    ):
        scores = attribute_summary(
            digits.store, digits.model, loader, summary, method=TracIn(), progress=False
        )
        torch.testing.assert_close(scores.values[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "as_given",
    [list, torch.Tensor.tolist, torch.Tensor.numpy, lambda groups: list(groups.numpy())],
    ids=["list of tensors", "list", "array", "list of numbers of NumPy"],
)
def test_groups_are_the_same_in_every_form(digits, as_given):
    """Tensors with equal values are one group, although they are not equal as keys."""
    loader = DataLoader(digits.test, batch_size=47)
    groups = digits.test.tensors[1] % 2
    settings = {"method": TracIn(), "progress": False}
    for summary in (lambda groups: Gap(groups, 1, 0), WorstGroupLoss):
        expected, found = (
            attribute_summary(digits.store, digits.model, loader, summary(form), **settings)
            for form in (groups, as_given(groups))
        )
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0)
    scores = attribute(digits.store, digits.model, loader, **settings)
    parity = scores.train_ids % 2
    table = influence_by_group(scores, as_given(parity), as_given(groups))
    assert table.train_groups == table.query_groups == (0, 1)
    assert torch.equal(table.values, influence_by_group(scores, parity, groups).values)


def test_groups_that_cannot_belong_to_the_queries_are_refused(digits):
    loader = DataLoader(digits.test, batch_size=47)
    shuffled = DataLoader(digits.test, batch_size=47, shuffle=True)
    with pytest.raises(ValueError, match="`loader` shuffles"):
        attribute_summary(digits.store, digits.model, shuffled, Gap([0] * 100, 0, 1))
    attribute_summary(digits.store, digits.model, shuffled, progress=False)  # Needs no order.
    summary = Gap(torch.zeros(100, 1, dtype=torch.int64), 0, 1)
    with pytest.raises(ValueError, match=r"`groups` holds \(a int\); expected one group"):
        attribute_summary(digits.store, digits.model, loader, summary, progress=False)


def test_a_method_that_is_not_linear_cannot_summarize(digits):
    loader = DataLoader(digits.test, batch_size=47)
    with pytest.raises(ValueError, match="not linear"):
        attribute_summary(digits.store, digits.model, loader, method=GradientSimilarity())
    with pytest.raises(ValueError, match="no group 'x'"):
        attribute_summary(digits.store, digits.model, loader, Gap([0] * 100, "x", 0))


def test_a_summary_of_a_regression_needs_no_labels():
    def squares(outputs, targets):
        return torch.nn.functional.mse_loss(outputs[:, 0], targets)

    def odd(outputs, targets):
        return (outputs[:, 0] - targets).abs().mean()

    x, _ = vectors().tensors
    data, groups = DataLoader(TensorDataset(x, x[:, 0] * 3), 5), torch.arange(13) % 2
    for loss in (squares, odd):
        store, model = MemoryStore(), Plain(mlp(classes=1), loss)
        quiet_trainer(GradientRecorder(store)).fit(model, data)
        settings = {"method": TracIn(), "progress": False}
        single = attribute(store, model, data, **settings).values
        mean = attribute_summary(store, model, data, **settings).values[0]
        torch.testing.assert_close(mean, single.mean(dim=0), rtol=1e-4, atol=1e-5)
        if loss is odd:
            with pytest.raises(ValueError, match="losses of some queries are unknown"):
                attribute_summary(store, model, data, WorstGroupLoss(groups), progress=False)
            continue
        with torch.no_grad():
            losses = (model.net(x)[:, 0] - x[:, 0] * 3).square()
        worst = int(losses[groups == 1].mean() > losses[groups == 0].mean())
        scores = attribute_summary(store, model, data, WorstGroupLoss(groups), **settings)
        expected = single[groups == worst].mean(dim=0)
        torch.testing.assert_close(scores.values[0], expected, rtol=1e-4, atol=1e-5)


def test_the_attribute_of_the_highest_scores_is_the_shortcut(digits):
    queries = digits.queries(20)
    method, target = TracIn(), Logit(3)
    scores = attribute(
        digits.store, digits.model, queries, method=method, target=target, progress=False
    )
    values = scores.values.double().mean(dim=0)
    chance = torch.Generator().manual_seed(0)
    attributes = {
        "random": torch.rand(301, generator=chance) < 0.3,
        "driving": values > values.quantile(0.8),
        "absent": torch.zeros(301, dtype=torch.bool),
    }
    found = find_shortcut(
        digits.store,
        digits.model,
        queries,
        attributes,
        method=method,
        target=target,
        n_permutations=199,
        progress=False,
    )
    frame = found.to_pandas()
    assert frame.index[0] == "driving"
    assert frame.p_value["driving"] == pytest.approx(3 / 200)
    assert frame.p_value["absent"] == 1
    assert frame.p_value["random"] > 0.05
    assert found.ids[0] == scores.train_ids[values.argmax()]
    assert "occur together" not in repr(found)


def test_attributes_that_occur_together_share_an_effect(digits):
    labels = torch.stack([label for _, label in digits.train])
    is_three, is_odd = labels == 3, labels % 2 == 1
    queries = [torch.stack([x for x, y in digits.train if y == 3])[:20], torch.full((20,), 3)]
    found = find_shortcut(
        digits.store,
        digits.model,
        queries,
        {"three": is_three, "odd": is_odd},
        target=Logit(3),
        n_permutations=99,
        progress=False,
    )
    assert [effect.attribute for effect in found.effects] == ["three", "odd"]
    assert "occur together share an effect: trust the strongest" in repr(found)


def test_a_class_is_no_shortcut_within_classes(digits):
    labels = torch.stack([label for _, label in digits.train])
    found = find_shortcut(
        digits.store,
        digits.model,
        digits.queries(20),
        {"is a three": labels == 3},
        classes=[f"digit {label}" for label in labels.tolist()],
        target=Logit(3),
        n_permutations=99,
        progress=False,
    )
    assert found.effects[0].effect == 0
    assert found.effects[0].p_value == 1


def test_the_same_data_as_reference_leave_no_effect(digits):
    queries = digits.queries(7)
    found = find_shortcut(
        digits.store,
        digits.model,
        queries,
        {"even": torch.arange(301) % 2 == 0},
        reference=queries,
        n_permutations=99,
        progress=False,
    )
    assert found.scores.values.abs().max() == 0


def test_a_reference_is_compared_by_the_class_of_the_slice(digits):
    x, y = digits.test.tensors
    with torch.no_grad():
        predicted = digits.model(x).argmax(dim=1)
    threes, others = (
        [x[mask], y[mask]] for mask in (predicted == 3, (predicted != 3) & (predicted != 8))
    )
    settings = {"method": TracIn(), "progress": False}
    found = find_shortcut(
        digits.store,
        digits.model,
        DataLoader(TensorDataset(*threes), 3),
        {},
        reference=others,
        **settings,
    )
    slice_, reference = (
        attribute(digits.store, digits.model, data, target=Logit(3), **settings).values
        for data in (threes, others)
    )
    expected = slice_.double().mean(dim=0) - reference.double().mean(dim=0)
    torch.testing.assert_close(found.scores.values, expected, rtol=1e-4, atol=1e-5)


def test_wrong_kinds_of_arguments_are_described(digits):
    """And not printed with all their numbers."""
    store, model = digits.store, digits.model
    batch = (torch.zeros(30, 64), torch.zeros(30, dtype=torch.long))
    with type_checks_disabled():
        with pytest.raises(ValueError, match=r"`loader` is \(a tensor of shape \(30, 64\)"):
            explain_errors(store, model, batch, progress=False)
        with pytest.raises(ValueError, match=r"`attributes` is \[1, 2\]; .*\"watermark\": mask"):
            find_shortcut(store, model, batch, [1, 2], progress=False)
