"""Optimizer dynamics: parameter groups that differ, several optimizers, and weight decay."""

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
from tda_lightning.attribution import BestAvailable
from tda_lightning.attribution.dynamics.optimizer import Dynamics, Extent
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

HAS_DECOUPLED = "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults


def with_groups(run, groups):
    """Return the run with other parameter groups, given by their settings."""
    changed = MemoryStore()
    changed.begin(run.recipe)
    for step in run:
        changed.append(replace(step, groups=tuple(replace(step.groups[0], **g) for g in groups)))
    return changed


BIASES = {"weight_decay": 0.0, "share": 0.25}
WEIGHTS = {"weight_decay": 0.4, "share": 0.75}


@METHODS
@pytest.mark.parametrize("name", ["SGD", "SGDW"], ids=["coupled", "decoupled"])
def test_differing_weight_decay_is_averaged_by_group_size_in_any_order(method, name):
    raw, run = plain_run(), MemoryStore()
    run.begin(raw.recipe)
    for step in raw:
        run.append(replace(step, optimizer=name))
    mean = scores(method, with_groups(run, [{"weight_decay": 0.3, "share": 1.0}]))
    for groups in ([BIASES, WEIGHTS], [WEIGHTS, BIASES]):
        torch.testing.assert_close(scores(method, with_groups(run, groups)), mean)


def test_a_group_without_recorded_parameters_is_ignored():
    run = with_groups(plain_run(), [{"weight_decay": 9.0, "momentum": 0.9}, {"share": 1.0}])
    torch.testing.assert_close(scores(Unrolled(), run), scores(Unrolled(), plain_run()))


def test_groups_of_unknown_sizes_count_equally():
    """Runs of older versions do not hold the sizes."""
    run = with_groups(plain_run(), [{"weight_decay": 0.1}, {"weight_decay": 0.5}])
    expected = with_groups(plain_run(), [{"weight_decay": 0.3}])
    torch.testing.assert_close(scores(Unrolled(), run), scores(Unrolled(), expected))


def test_weight_decay_of_a_group_is_scaled_by_its_learning_rate():
    """Rows are relative to the largest rate of all groups, and so is weight decay."""
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
        with pytest.warns(UserWarning, match="groups of SGD differ in momentum") as caught:
            values = scores(method, with_groups(plain_run(), order))
        assert len(caught) == 1
        torch.testing.assert_close(values, expected)


def test_nesterov_momentum_in_half_of_the_parameters_is_half_way_between_the_kinds():
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
    run, _ = record(no_decay_on_vectors)
    sizes = [11 + 11 + 11 + 3, 7 * 11 + 11 * 3]
    assert [g.share for g in run[0].groups] == pytest.approx([n / sum(sizes) for n in sizes])
    with pytest.warns(UserWarning, match="not recorded"):
        head, _ = record(no_decay_on_vectors, layers=["net.3"])
    assert [g.share for g in head[-1].groups] == pytest.approx([3 / 36, 33 / 36])


def test_without_decay_on_vectors_scores_are_close_to_those_of_a_decay_by_group():
    """With unsketched rows, the decay of each column is known, and is applied by hand."""
    run, model = record(no_decay_on_vectors)
    queries = vectors()[:3]
    double = (queries[0].double(), queries[1])
    values = attribute(run, model, double, method=Unrolled(), progress=False).values
    selection = select_parameters(model)
    decays = torch.cat(
        [
            lay_out(block, [torch.full_like(p, 0.3 * (p.ndim == 2)) for p in parameters])
            .detach()
            .flatten()
            for block, parameters in zip(selection.blocks, selection.parameters, strict=True)
        ]
    )
    u = record_queries(model, (queries[0].double(), queries[1]), like=run)
    expected = torch.zeros_like(values)
    for step in reversed(run):
        expected[:, step.sample_ids] += step.lr * u @ step.sketch.mT
        factor = BestAvailable().factor(step)
        eigenvalues, eigenvectors = torch.linalg.eigh(factor @ factor.mT)
        ratios = -torch.expm1(-step.lr * eigenvalues) / eigenvalues
        inner = (eigenvectors * ratios) @ eigenvectors.mT
        u = u - step.lr * decays * u - ((u @ factor.mT) @ inner) @ factor
    assert float((values - expected).norm() / expected.norm()) < 0.02


class TwoHeads(pl.LightningModule):
    """Two linear models, each with a separate optimizer; the optimizers take turns."""

    def __init__(self, turns, **settings):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.first, self.second = (nn.Linear(7, 3).double() for _ in range(2))
        self.turns, self.settings = turns, settings

    def training_step(self, batch, batch_idx):
        x, y = batch
        pairs = zip(self.optimizers(), (self.first, self.second), strict=True)
        for optimizer, head in list(pairs)[: self.turns]:
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(head(x), y))
            optimizer.step()
        return cross_entropy(self.first(x), y)

    def configure_optimizers(self):
        return [SGD(h.parameters(), lr=0.2, **self.settings) for h in (self.first, self.second)]


def two_heads(turns, **settings):
    store, model = MemoryStore(), TwoHeads(turns, **settings)
    x, y = vectors().tensors
    data = TensorDataset(x.double(), y)
    recorder = GradientRecorder(store, projector=Identity())
    trainer = quiet_trainer(recorder, precision="64-true", max_epochs=6)
    trainer.fit(model, loader(data, shuffle=False))
    return store


def first_head_queries(run):
    """Return queries that depend on the first head only."""
    queries = torch.zeros(3, run.recipe.dimension, dtype=torch.float64)
    queries[:, :24] = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    return queries


@METHODS
def test_a_head_does_not_decay_in_the_steps_of_another(method):
    both = two_heads(2, weight_decay=0.4)
    alone = with_groups(two_heads(1, weight_decay=0.4), [{"share": 1.0}])
    assert {sum(g.share for g in step.groups) for step in both} == {0.5}
    expected, values = (scores(method, run, first_head_queries(run)) for run in (alone, both))
    assert float((values - expected).norm() / expected.norm()) < 0.03
    # A round of two turns decays as much as a step of the head alone.
    expected_decay, turn_decay = (step.lr * Dynamics.of(step).decay for step in (alone[1], both[1]))
    assert 2 * turn_decay == pytest.approx(expected_decay)


def test_the_momentum_of_a_head_is_unchanged_in_the_steps_of_another():
    both, alone = (two_heads(turns, momentum=0.9) for turns in (2, 1))
    # An owner is named by the number of its first parameter.
    assert [step.groups[0].owner for step in both[:4]] == [0, 2, 0, 2]
    expected, values = (scores(Unrolled(), run, first_head_queries(run)) for run in (alone, both))
    torch.testing.assert_close(values, expected)


def test_the_decay_of_a_training_is_the_mean_weighted_by_learning_rate():
    run = with_groups(plain_run(momentum=0.5), [BIASES, WEIGHTS])
    assert Extent.of(run).decay == pytest.approx(0.3)
    changing = MemoryStore()
    changing.begin(run.recipe)
    for step in run:
        factor = 3.0 if step.index < 3 else 1.0
        groups = tuple(replace(g, weight_decay=factor * g.weight_decay) for g in step.groups)
        changing.append(replace(step, groups=groups))
    effective_lrs = [Dynamics.of(step).effective_lr for step in run]
    mean = (3 * sum(effective_lrs[:3]) + sum(effective_lrs[3:])) / sum(effective_lrs)
    assert Extent.of(changing).decay == pytest.approx(0.3 * mean)


@METHODS
@pytest.mark.skipif(
    not HAS_DECOUPLED, reason="`Adam` of this torch version has no `decoupled_weight_decay`"
)
def test_adam_with_decoupled_decay_scores_like_adamw(method):
    settings = {"lr": 0.01, "weight_decay": 3.0}
    adamw, adamw_model = record(lambda p: torch.optim.AdamW(p, **settings))
    adam, adam_model = record(
        lambda p: torch.optim.Adam(p, decoupled_weight_decay=True, **settings)
    )
    pairs = zip(adam_model.parameters(), adamw_model.parameters(), strict=True)
    assert all(torch.equal(parameter, same) for parameter, same in pairs)
    queries = adamw[0].sketch[:3]
    torch.testing.assert_close(scores(method, adam, queries), scores(method, adamw, queries))
    assert Dynamics.of(adam[-1]).decay == 3.0


@METHODS
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_decoupled_decay_counts_under_every_optimizer_that_supports_it(method, kind):
    run, _ = record(lambda p: kind(p, lr=0.01, weight_decay=3.0, decoupled_weight_decay=True))
    assert Dynamics.of(run[-1]).decoupled_decay == 3.0
    coupled, _ = record(lambda p: kind(p, lr=0.01, weight_decay=3.0))
    assert Dynamics.of(coupled[-1]).decay == 0.0


@METHODS
def test_a_training_at_rate_zero_gives_scores_of_zero(method):
    still = ls.record(ls.problem(), lambda p: SGD(p, lr=0.0, weight_decay=0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scores(method, still), torch.zeros(ls.N_QUERY, ls.N_TRAIN).double())
    extent = Extent.of(still)
    assert (extent.total_lr, extent.decay) == (0.0, 0.0)


def test_decoupled_decay_does_not_pass_through_momentum():
    run, decoupled = plain_run(momentum=0.9), MemoryStore()
    decoupled.begin(run.recipe)
    for step in run:
        group = replace(step.groups[0], weight_decay=0.3)
        decoupled.append(replace(step, optimizer="SGDW", groups=(group,)))
    extent = Extent.of(decoupled)
    assert extent.decay * extent.total_lr == pytest.approx(0.3 * sum(step.lr for step in decoupled))
