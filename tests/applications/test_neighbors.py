"""Copies and foreign samples are found by comparing all pairs of gradients or features."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import DataLoader, Subset, TensorDataset

from tda_lightning import GradientRecorder, LossRecorder
from tda_lightning.applications import find_duplicates, find_outliers
from tda_lightning.stores import MemoryStore

N = 31
# Copies in a chain, each of the one before; the last one has another label.
COPIES = {3: 31, 31: 32, 7: 33, 11: 34}


def with_copies():
    x, y = vectors(n=N).tensors
    noise = 0.003 * torch.randn(len(COPIES), 7, generator=torch.Generator().manual_seed(5))
    for number, original in enumerate(COPIES):
        x, y = (
            torch.cat([x, (x[original] + noise[number])[None]]),
            torch.cat([y, y[original, None]]),
        )
    y[34] = (y[34] + 1) % 3
    return TensorDataset(x, y)


@pytest.fixture(scope="module")
def trained():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store), max_epochs=3).fit(model, loader(with_copies()))
    return store, model


def mean_directions(store):
    sums = {}
    for step in store:
        for sample, row in zip(step.sample_ids.tolist(), step.sketch.double(), strict=True):
            sums[sample] = sums.get(sample, 0) + row / row.norm()
    return torch.stack([sums[sample] / sums[sample].norm() for sample in sorted(sums)])


def components(cosines, threshold):
    """Return the groups that are connected by cosines above a threshold, one sample at a time."""
    groups, waiting = [], set(range(len(cosines)))
    while waiting:
        group, frontier = set(), {min(waiting)}
        while frontier:
            sample = frontier.pop()
            group.add(sample)
            frontier |= {j for j in waiting - group if cosines[sample, j] >= threshold}
        waiting -= group
        groups += [sorted(group)] if len(group) > 1 else []
    return sorted(groups)


def test_a_similarity_is_a_cosine(trained):
    with pytest.raises(ValueError, match=r"`similarity` is 98\.0; expected a cosine from 0 to 1"):
        find_duplicates(trained[0], similarity=98.0)


@pytest.mark.parametrize("threshold", [None, 0.7, 0.0])
def test_groups_are_connected_by_similar_gradients(trained, threshold):
    store, _ = trained
    units = mean_directions(store)
    cosines = (units @ units.T).fill_diagonal_(-1)
    found = find_duplicates(store, similarity=threshold)
    assert sorted(map(torch.Tensor.tolist, found.groups)) == components(cosines, found.threshold)
    torch.testing.assert_close(found.similarities.double(), cosines.amax(dim=1), atol=1e-5, rtol=0)
    best = [float(found.similarities[group].max()) for group in found.groups]
    assert best == sorted(best, reverse=True)
    assert ("probably no copies" in " ".join(repr(found).split())) == (len(found.ids) > 35 / 5)


def test_the_run_finds_copies_with_the_same_label(trained):
    found = find_duplicates(trained[0])
    assert sorted(map(torch.Tensor.tolist, found.groups)) == [[3, 31, 32], [7, 33]]
    assert sorted(found.redundant_ids.tolist()) == [31, 32, 33]
    assert found.to_pandas().loc[[3, 31, 32], "group"].nunique() == 1
    assert "5 of 35 samples are in 2 groups" in repr(found)
    assert "different labels cannot be found" in repr(found)
    with pytest.raises(ValueError, match="Labels are unknown"):
        _ = found.disagreeing


def test_the_model_finds_copies_with_other_labels(trained):
    shuffled = loader(with_copies())
    found = find_duplicates(*trained, shuffled, layer="net.0", progress=False)
    assert sorted(map(torch.Tensor.tolist, found.groups)) == [[3, 31, 32], [7, 33], [11, 34]]
    assert [group.tolist() for group in found.disagreeing] == [[11, 34]]
    frame = found.to_pandas()
    assert frame.index[frame.disagrees].tolist() == [11, 34]
    assert frame.label.tolist() == with_copies().tensors[1][found.ids].tolist()
    assert repr(found).split("\n")[1:3] == [
        "  labels disagree in 1 groups",
        "  " + ", ".join(f"{i} (label {with_copies().tensors[1][i]})" for i in (11, 34)),
    ]


def test_samples_outside_the_loader_and_data_without_labels_are_stated(trained):
    part = DataLoader(Subset(with_copies(), range(2, 35)), batch_size=5)
    found = find_duplicates(*trained, part, layer="net.0", labels=None, progress=False)
    assert [3, 31, 32] in [group.tolist() for group in found.groups]
    assert "2 samples of the run are not in the loader" in repr(found)


def test_outliers_are_far_from_their_neighbors(trained):
    store, _ = trained
    units = mean_directions(store)
    cosines = units @ units.T
    found = find_outliers(store, neighbors=3, number=5)
    for i in range(len(units)):
        others = torch.cat([cosines[i, :i], cosines[i, i + 1 :]])
        expected = 1 - others.sort(descending=True).values[:3].mean()
        assert float(found.distances[i]) == pytest.approx(float(expected), abs=1e-5)
    assert found.ids.tolist() == found.distances.argsort(descending=True)[:5].tolist()
    assert found.scores.tolist() == found.distances[found.ids].tolist()
    assert found.nearest[3] in (31, 32)
    frame = found.to_pandas()
    assert frame.index[frame.is_outlier].tolist() == sorted(found.ids.tolist())
    assert "cannot be found" in repr(found)


def test_samples_beyond_the_outer_fence_are_flagged(trained):
    found = find_outliers(trained[0])
    low, high = torch.quantile(found.distances, torch.tensor([0.25, 0.75]).double())
    assert found.fence == pytest.approx(float(high + 3 * (high - low)))
    assert len(found.ids) == int((found.distances > found.fence).sum())
    assert "too few for a reliable fence" in repr(found)


def test_samples_without_a_finite_gradient_are_not_examined():
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx else 1)

    store = MemoryStore()
    with pytest.warns(UserWarning, match="is not finite"):
        quiet_trainer(GradientRecorder(store), max_epochs=1).fit(Broken(mlp()), loader(vectors()))
    drawn = store[0].sample_ids
    for found in (find_duplicates(store), find_outliers(store)):
        assert set(found.ids.tolist()) <= set(drawn.tolist())
        assert "8 samples have no direction" in repr(found)
    assert find_outliers(store).distances.isnan().sum() == 8


def test_a_single_class_has_no_gradients_to_compare():
    store = MemoryStore()
    data = TensorDataset(vectors().tensors[0], torch.zeros(13).long())
    quiet_trainer(GradientRecorder(store)).fit(Plain(mlp(classes=1)), loader(data))
    assert find_duplicates(store).groups == ()
    assert find_outliers(store).ids.tolist() == []
    assert "most unusual, with distance: none" in repr(find_outliers(store))


def test_the_most_unusual_samples_are_shown_even_if_none_is_flagged():
    store = MemoryStore()
    quiet_trainer(GradientRecorder(store)).fit(Plain(mlp()), loader(vectors()))
    found = find_outliers(store, number=0)
    farthest = int(found.train_ids[found.distances.argmax()])
    assert found.ids.tolist() == []
    assert f"most unusual, with distance: {farthest} ({found.distances.max():.2f})" in repr(found)


def test_runs_without_rows_need_the_model():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(LossRecorder(store)).fit(model, loader(with_copies()))
    for find in (find_duplicates, find_outliers):
        with pytest.raises(ValueError, match="losses and no rows"):
            find(store)
    with pytest.raises(ValueError, match="Only one of `model` and `loader`"):
        find_duplicates(store, model)
    assert len(find_duplicates(store, model, loader(with_copies()), progress=False).groups) >= 3
