"""What a step does where its parameters are not treated alike, and where it is not known."""

import warnings
from dataclasses import replace

import least_squares as ls
import pytest
import pytorch_lightning as pl
import torch
from least_squares_runs import METHODS, plain_run, record, scores
from lightning_models import loader, quiet_trainer, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity, Unrolled, attribute
from tda_lightning.attribution.dynamics.optimizer import Dynamics, Extent
from tda_lightning.gradients.layers import select_layers
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

HAS_DECOUPLED = "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults


def with_groups(run, groups):
    """The run, as if its optimizer had had these groups: settings of each."""
    changed = MemoryStore()
    changed.begin(run.recipe)
    for step in run:
        changed.append(replace(step, groups=tuple(replace(step.groups[0], **g) for g in groups)))
    return changed


BIASES = {"weight_decay": 0.0, "share": 0.25}
WEIGHTS = {"weight_decay": 0.4, "share": 0.75}


@METHODS
@pytest.mark.parametrize("name", ["SGD", "SGDW"], ids=["coupled", "decoupled"])
def test_groups_that_decay_unalike_count_as_much_as_they_hold_in_any_order(method, name):
    raw, run = plain_run(), MemoryStore()
    run.begin(raw.recipe)
    for step in raw:
        run.append(replace(step, optimizer=name))
    mean = scores(method, with_groups(run, [{"weight_decay": 0.3, "share": 1.0}]))
    for groups in ([BIASES, WEIGHTS], [WEIGHTS, BIASES]):
        torch.testing.assert_close(scores(method, with_groups(run, groups)), mean)


def test_a_group_of_which_nothing_is_recorded_counts_for_nothing():
    run = with_groups(plain_run(), [{"weight_decay": 9.0, "momentum": 0.9}, {"share": 1.0}])
    torch.testing.assert_close(scores(Unrolled(), run), scores(Unrolled(), plain_run()))


def test_groups_of_unknown_sizes_count_alike():
    """As in runs of older versions."""
    run = with_groups(plain_run(), [{"weight_decay": 0.1}, {"weight_decay": 0.5}])
    expected = with_groups(plain_run(), [{"weight_decay": 0.3}])
    torch.testing.assert_close(scores(Unrolled(), run), scores(Unrolled(), expected))


def test_a_slow_group_decays_as_slowly_as_it_learns():
    """Rows are relative to the largest rate, and so is what decays."""
    groups = [
        {"lr": 0.05, "weight_decay": 0.2, "share": 0.5},
        {"lr": 0.01, "weight_decay": 0.5, "share": 0.5},
    ]
    assert Dynamics.of(with_groups(plain_run(), groups)[0]).decay == pytest.approx(0.15)


@METHODS
def test_groups_of_different_momentum_are_averaged_with_one_warning(method):
    groups = [{"momentum": 0.9, "share": 0.75}, {"momentum": 0.5, "share": 0.25}]
    expected = scores(method, with_groups(plain_run(), [{"momentum": 0.8}]))
    for order in (groups, groups[::-1]):
        with pytest.warns(UserWarning, match="groups of SGD differ in momentum") as said:
            found = scores(method, with_groups(plain_run(), order))
        assert len(said) == 1
        torch.testing.assert_close(found, expected)


def test_half_a_nesterov_momentum_is_half_way_between_the_kinds():
    group = plain_run(momentum=0.8)[1].groups[0]
    step = plain_run()[1]

    def effective_lr(*kinds):
        groups = tuple(replace(group, nesterov=kind, share=0.5) for kind in kinds)
        return Dynamics.of(replace(step, groups=groups)).effective_lr

    assert effective_lr(0.0, 1.0) == pytest.approx((effective_lr(0.0) + effective_lr(1.0)) / 2)


def no_decay_on_vectors(parameters):
    named = list(parameters)
    vectors_, matrices = ([p for p in named if p.ndim == d] for d in (1, 2))
    groups = [{"params": vectors_, "weight_decay": 0.0}, {"params": matrices}]
    return torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)


def test_the_share_of_each_group_is_recorded():
    whole, _ = record(no_decay_on_vectors)
    sizes = [11 + 11 + 11 + 3, 7 * 11 + 11 * 3]
    assert [g.share for g in whole[0].groups] == pytest.approx([n / sum(sizes) for n in sizes])
    with pytest.warns(UserWarning, match="not recorded"):
        head, _ = record(no_decay_on_vectors, layers=["net.3"])
    assert [g.share for g in head[-1].groups] == pytest.approx([3 / 36, 33 / 36])


def test_without_decay_on_vectors_scores_are_nearly_those_of_a_decay_that_knows_which_is_which():
    """Group by group, by hand: whole rows tell which column decays."""
    run, model = record(no_decay_on_vectors)
    queries = vectors()[:3]
    found = attribute(run, model, (queries[0].double(), queries[1]), progress=False).values
    sources = [source for source, *_ in select_layers(model).sources]
    decays = torch.cat(
        [
            s.rule.layout([torch.full_like(p, 0.3 * (p.ndim == 2)) for p in s.parameters()])
            .detach()
            .flatten()
            for s in sources
        ]
    )
    left = record_queries(model, (queries[0].double(), queries[1]), like=run)
    expected = torch.zeros_like(found)
    for step in reversed(run):
        expected[:, step.sample_ids] += step.lr * left @ step.sketch.mT
        scaled = step.sketch / step.weights.sqrt()[:, None]
        values, axes = torch.linalg.eigh(scaled @ scaled.mT)
        taken = -torch.expm1(-step.lr * values) / values
        inner = (axes * taken) @ axes.mT
        left = left - step.lr * decays * left - ((left @ scaled.mT) @ inner) @ scaled
    assert float((found - expected).norm() / expected.norm()) < 0.02


class TwoHeads(pl.LightningModule):
    """Two linear models side by side, each with an optimizer of its own; they take turns."""

    def __init__(self, turns, **settings):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.one, self.other = (nn.Linear(7, 3).double() for _ in range(2))
        self.turns, self.settings = turns, settings

    def training_step(self, batch, batch_idx):
        x, y = batch
        pairs = zip(self.optimizers(), (self.one, self.other), strict=True)
        for optimizer, head in list(pairs)[: self.turns]:
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(head(x), y))
            optimizer.step()
        return cross_entropy(self.one(x), y)

    def configure_optimizers(self):
        return [SGD(h.parameters(), lr=0.2, **self.settings) for h in (self.one, self.other)]


def two_heads(turns, **settings):
    store, model = MemoryStore(), TwoHeads(turns, **settings)
    x, y = vectors().tensors
    data = TensorDataset(x.double(), y)
    recorder = GradientRecorder(store, projector=Identity())
    trainer = quiet_trainer(recorder, precision="64-true", max_epochs=6)
    trainer.fit(model, loader(data, shuffle=False))
    return store


def about_the_first(run):
    """Queries that depend on the first head only."""
    queries = torch.zeros(3, run.recipe.dimension, dtype=torch.float64)
    queries[:, :24] = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    return queries


@METHODS
def test_a_head_does_not_decay_in_the_steps_of_another(method):
    both = two_heads(2, weight_decay=0.4)
    alone = with_groups(two_heads(1, weight_decay=0.4), [{"share": 1.0}])
    assert {sum(g.share for g in step.groups) for step in both} == {0.5}
    expected, found = (scores(method, run, about_the_first(run)) for run in (alone, both))
    assert float((found - expected).norm() / expected.norm()) < 0.03
    # A round of two turns decays as much as the turn of the head alone.
    whole, turn = (step.lr * Dynamics.of(step).decay for step in (alone[1], both[1]))
    assert 2 * turn == pytest.approx(whole)


def test_the_momentum_of_a_head_rests_in_the_steps_of_another():
    both, alone = (two_heads(turns, momentum=0.9) for turns in (2, 1))
    assert [step.groups[0].owner for step in both[:4]] == [0, 1, 0, 1]
    expected, found = (scores(Unrolled(), run, about_the_first(run)) for run in (alone, both))
    torch.testing.assert_close(found, expected)


def test_the_decay_of_a_training_is_the_mean_over_its_time():
    run = with_groups(plain_run(momentum=0.5), [BIASES, WEIGHTS])
    assert Extent.of(run).decay == pytest.approx(0.3)
    slow = MemoryStore()
    slow.begin(run.recipe)
    for step in run:
        factor = 3.0 if step.index < 3 else 1.0
        groups = tuple(replace(g, weight_decay=factor * g.weight_decay) for g in step.groups)
        slow.append(replace(step, groups=groups))
    reaches = [Dynamics.of(step).effective_lr for step in run]
    mean = (3 * sum(reaches[:3]) + sum(reaches[3:])) / sum(reaches)
    assert Extent.of(slow).decay == pytest.approx(0.3 * mean)


@METHODS
@pytest.mark.skipif(not HAS_DECOUPLED, reason="this version of torch has no such argument")
def test_adam_with_decoupled_decay_scores_as_adamw_does(method):
    settings = {"lr": 0.01, "weight_decay": 3.0}
    one, model = record(lambda p: torch.optim.AdamW(p, **settings))
    other, same = record(lambda p: torch.optim.Adam(p, decoupled_weight_decay=True, **settings))
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    queries = one[0].sketch[:3]
    torch.testing.assert_close(scores(method, other, queries), scores(method, one, queries))
    assert Dynamics.of(other[-1]).decay == 3.0


@METHODS
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_decoupled_decay_counts_under_any_optimizer_that_has_it(method, kind):
    run, _ = record(lambda p: kind(p, lr=0.01, weight_decay=3.0, decoupled_weight_decay=True))
    assert Dynamics.of(run[-1]).decoupled == 3.0
    coupled, _ = record(lambda p: kind(p, lr=0.01, weight_decay=3.0))
    assert Dynamics.of(coupled[-1]).decay == 0.0


@METHODS
def test_a_training_at_rate_zero_moved_nothing(method):
    still = ls.record(ls.problem(), lambda p: SGD(p, lr=0.0, weight_decay=0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scores(method, still), torch.zeros(ls.N_QUERY, ls.N_TRAIN).double())
    extent = Extent.of(still)
    assert (extent.time, extent.decay) == (0.0, 0.0)


def test_decoupled_decay_does_not_pass_through_momentum():
    run, decoupled = plain_run(momentum=0.9), MemoryStore()
    decoupled.begin(run.recipe)
    for step in run:
        group = replace(step.groups[0], weight_decay=0.3)
        decoupled.append(replace(step, optimizer="SGDW", groups=(group,)))
    extent = Extent.of(decoupled)
    assert extent.decay * extent.time == pytest.approx(0.3 * sum(step.lr for step in decoupled))
