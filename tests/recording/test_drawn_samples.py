"""Rows of a step that draws its batch again have the ids drawn; rows of two samples are named."""

import numpy as np
import pytest
import torch
from lightning_models import IndexedVectors, Plain, TrainingLog, loader, mlp, quiet_trainer
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from tda_lightning import ContributionTracker, GradientRecorder, Identity, LossRecorder
from tda_lightning.stores import MemoryStore

CLASSES = 3


class Drawing(Plain):
    """Draws its batch again, and notes the indices that the network sees."""

    def __init__(self, draw):
        super().__init__(mlp())
        self.draw, self.seen, self.losses = draw, [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = self.draw(x)
        x, y = x[order], y[order]
        self.seen.append(x[:, 0].long().tolist())
        out = self.net(x / 13)
        self.losses.append(cross_entropy(out.detach(), y, reduction="none"))
        return cross_entropy(out, y)


DRAWS = {
    "a permutation": lambda x: torch.randperm(len(x)),
    "with replacement": lambda x: torch.randint(len(x), (len(x),)),
    "an order of numpy": lambda x: np.random.permutation(len(x)),
    "a list": lambda x: list(range(len(x)))[::-1],
    "sorted": lambda x: x[:, 1].argsort(),
}


def recorded(model, batch_size=5, recorder_type=GradientRecorder, **settings):
    store, log = MemoryStore(), TrainingLog()
    recorder = recorder_type(store, projector=Identity(), **settings)
    data = loader(IndexedVectors(), batch_size)
    quiet_trainer(recorder, log).fit(model, data)
    return store, log


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_rows_have_the_ids_of_the_samples_that_were_drawn(draw):
    model = Drawing(draw)
    store, _ = recorded(model)
    assert [step.sample_ids.tolist() for step in store] == model.seen
    assert len(store) == 6


class FlowMatching(Plain):
    """Conditional flow matching with minibatch optimal transport (Tong et al. 2024)."""

    def __init__(self):
        super().__init__(mlp(8, 7).double(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.terms = []

    def training_step(self, batch, batch_idx):
        x1 = batch[0].double() / 13
        x0 = torch.randn_like(x1)
        plan = (-torch.cdist(x0, x1).square()).flatten().softmax(0)
        pairs = torch.multinomial(plan, len(x1), replacement=True)
        x0, x1 = x0[pairs // len(x1)], x1[pairs % len(x1)]
        t = torch.rand(len(x1), 1, dtype=torch.float64)
        xt = t * x1 + (1 - t) * x0 + 0.01 * torch.randn_like(x0)
        self.terms.append(((x1[:, 0] * 13).round().long().tolist(), xt, t, x1 - x0))
        velocity = self.net(torch.cat([xt, t], dim=-1))
        return (velocity - (x1 - x0)).square().mean()


def test_rows_of_flow_matching_are_the_gradients_of_the_pairs_of_their_samples():
    torch.manual_seed(0)
    model = FlowMatching()
    store, log = recorded(model)
    assert [step.sample_ids.tolist() for step in store] == [ids for ids, *_ in model.terms]
    for step, weights, (ids, xt, t, ut) in zip(store, log.weights, model.terms, strict=True):
        names = [name for name, _ in model.named_parameters()]
        model.load_state_dict({name: weights[name] for name in names})
        losses = (model.net(torch.cat([xt, t], dim=-1)) - ut).square().mean(dim=1) / len(ids)
        for loss, row in zip(losses, step.sketch, strict=True):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            norm = torch.stack([grad.square().sum() for grad in grads]).sum()
            assert torch.allclose(row.square().sum(), norm, rtol=1e-9)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_draws_are_followed_in_any_precision(precision):
    store, model = MemoryStore(), Drawing(DRAWS["a permutation"])
    quiet_trainer(GradientRecorder(store), precision=precision).fit(model, loader(IndexedVectors()))
    assert [step.sample_ids.tolist() for step in store] == model.seen


def test_samples_that_are_put_back_in_order_keep_their_ids():
    def step(model, x, y):
        order = x[:, 1].argsort()
        return cross_entropy(model.net(x[order])[order.argsort()], y)

    store, log = recorded(Stepping(step))
    assert_in_order(store, log)


class Stepping(Plain):
    """Computes its loss with a function of the model, inputs and labels."""

    def __init__(self, step):
        super().__init__(mlp())
        self.step = step

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.step(self, x / 13, y)


def assert_in_order(store, log):
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids


def hot(y):
    return one_hot(y, CLASSES).float()


def swapped(x):
    return x.roll(1, 0)


def mixup_of_soft_labels(model, x, y):
    share = torch.rand(len(x), 1)  # Differs by sample, so that labels alone do not show it.
    labels = share * hot(y) + (1 - share) * swapped(hot(y))
    return cross_entropy(model.net(share * x + (1 - share) * swapped(x)), labels)


def mixup_of_targets(model, x, y):
    y = y.float()
    out = model.net(0.7 * x + 0.3 * x.flip(0))[:, 0]
    return mse_loss(out, 0.7 * y + 0.3 * y.flip(0))


def mixed_inputs_alone(model, x, y):
    return cross_entropy(model.net(torch.lerp(x, swapped(x), 0.1)), y)


def cutmix(model, x, y):
    x = x.clone()
    x[:, 2:4] = swapped(x)[:, 2:4]
    return cross_entropy(model.net(x), y)


def mixup_in_place(model, x, y):
    other = swapped(x).mul_(0.3)
    return cross_entropy(model.net(x.mul(0.7).add_(other)), y)


def manifold_mixup(model, x, y):
    hidden, y = model.net[0](x), y.float()
    out = model.net[1:](0.7 * hidden + 0.3 * swapped(hidden))[:, 0]
    return mse_loss(out, 0.7 * y + 0.3 * swapped(y))


def permuted_negatives(model, x, y):
    return functional.softplus((model.net(x) * model.net(x.flip(0))).sum(dim=1)).mean()


def joined_negatives(model, x, y):
    first, second = model.net(torch.cat([x, swapped(x)])).chunk(2)
    return functional.softplus((first * second).sum(dim=1)).mean()


def labels_of_others(model, x, y):
    return cross_entropy(model.net(x), swapped(y))


def copies_that_follow_one_another(model, x, y):
    return cross_entropy(model.net(x.repeat_interleave(2, 0)), y.repeat_interleave(2))


MIXING = [
    mixup_of_soft_labels,
    mixup_of_targets,
    mixed_inputs_alone,
    cutmix,
    mixup_in_place,
    manifold_mixup,
    permuted_negatives,
    joined_negatives,
    labels_of_others,
]


@pytest.mark.parametrize("step", MIXING, ids=lambda step: step.__name__)
def test_rows_of_two_samples_are_warned_of_once(step):
    with pytest.warns(UserWarning, match="rows of the batch hold two samples") as caught:
        store, log = recorded(Stepping(step))
    assert sum("two samples" in str(warning.message) for warning in caught) == 1
    assert_in_order(store, log)


def normalized_inputs(model, x, y):
    return cross_entropy(model.net((x - x.mean(0)) / (x.std(0) + 1)), y)


def negatives_of_outputs(model, x, y):
    outputs = model.net(x)
    return functional.softplus((outputs * swapped(outputs)).sum(dim=1)).mean()


def contrast_of_labels(model, x, y):
    outputs = functional.normalize(model.net(x))
    same = (y[:, None] == y[None]).float()
    scores = (outputs @ outputs.mT).log_softmax(dim=1)
    return -((scores * same).sum(dim=1) / same.sum(dim=1)).mean()


def contrast_of_views(model, x, y):
    n = len(x)
    outputs = functional.normalize(model.net(torch.cat([x + 0.1 * torch.randn_like(x), 2 * x])))
    scores = outputs @ outputs.mT - 1e9 * torch.eye(2 * n)
    return cross_entropy(scores, torch.arange(2 * n).roll(n))


def loss_of_some(model, x, y):
    is_used = y < 2
    return cross_entropy(model.net(x)[is_used], y[is_used])


def sorted_into_two_calls(model, x, y):
    outputs = x.new_zeros(len(x), CLASSES)
    for mask in (x[:, 1] > 0, x[:, 1] <= 0):
        outputs[mask] = model.net(x[mask])
    # Rows without a weight have no gradient that would show whose they are.
    return ((x[:, 2] > 0) * cross_entropy(outputs, y, reduction="none")).mean()


def augmented(model, x, y):
    is_changed = torch.rand(len(x), 1) < 0.5
    return cross_entropy(model.net(torch.where(is_changed, x.flip(1), x.clamp(max=1))), y)


HONEST = [
    normalized_inputs,
    negatives_of_outputs,
    contrast_of_labels,
    contrast_of_views,
    loss_of_some,
    sorted_into_two_calls,
    augmented,
    copies_that_follow_one_another,
]


@pytest.mark.parametrize("step", HONEST, ids=lambda step: step.__name__)
def test_rows_of_single_samples_keep_their_ids_without_a_warning(step):
    torch.manual_seed(0)
    store, log = recorded(Stepping(step), batch_size=13)  # Every batch has every class.
    assert_in_order(store, log)


class LateMixup(Plain):
    """Mixes samples from its third batch on."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x if self.global_step < 2 else 0.7 * x + 0.3 * swapped(x)
        return cross_entropy(self.net(x / 13), y)


def test_mixing_that_begins_later_is_noticed_in_one_of_the_next_batches():
    with pytest.warns(UserWarning, match="rows of the batch hold two samples"):
        recorded(LateMixup(mlp()))


class LateDrawing(Drawing):
    """Draws its samples from its third batch on."""

    def training_step(self, batch, batch_idx):
        if self.global_step >= 2:
            return super().training_step(batch, batch_idx)
        self.seen.append(batch[0][:, 0].long().tolist())
        return cross_entropy(self.net(batch[0] / 13), batch[1])


def test_draws_that_begin_later_are_warned_of_and_followed_from_there_on():
    model = LateDrawing(DRAWS["a list"])
    with pytest.warns(UserWarning, match="noticed in recorded batch 4"):
        store, _ = recorded(model)
    ids = [step.sample_ids.tolist() for step in store]
    assert ids[:2] == model.seen[:2]
    assert ids[2] == model.seen[2][::-1]
    assert ids[3:] == model.seen[3:]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_following_the_samples_leaves_the_training_unchanged(draw):
    def weights(*callbacks):
        torch.manual_seed(0)
        np.random.seed(0)
        model = Drawing(draw)
        quiet_trainer(*callbacks).fit(model, loader(IndexedVectors()))
        return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.rand(1)

    plain, recorded = weights(), weights(GradientRecorder(MemoryStore()))
    assert torch.equal(plain[0], recorded[0])
    assert torch.equal(plain[1], recorded[1])


class InHook(Plain):
    """Changes its batch after the transfer to the device."""

    def __init__(self, change):
        super().__init__(mlp())
        self.change, self.seen = change, []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.change(*batch) if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0][:, 0].long().tolist())
        return cross_entropy(self.net(batch[0] / 13), batch[1])


def test_a_hook_may_permute_the_batch():
    def change(x, y):
        order = torch.randperm(len(x))
        return x[order], y[order]

    model = InHook(change)
    store, _ = recorded(model)
    assert [step.sample_ids.tolist() for step in store] == model.seen


def test_a_hook_that_mixes_is_warned_of():
    with pytest.warns(UserWarning, match="rows of the batch hold two samples"):
        recorded(InHook(lambda x, y: (0.7 * x + 0.3 * swapped(x), y)))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_recorded_losses_have_the_ids_that_were_drawn(draw):
    store, model = MemoryStore(), Drawing(draw)
    quiet_trainer(LossRecorder(store)).fit(model, loader(IndexedVectors()))
    assert [step.sample_ids.tolist() for step in store] == model.seen
    for step, losses in zip(store, model.losses, strict=True):
        assert torch.allclose(step.losses, losses, rtol=1e-5)


def test_recorded_losses_of_samples_that_are_put_back_in_order_keep_their_ids():
    def step(model, x, y):
        order = x[:, 1].argsort()
        return cross_entropy(model.net(x[order])[order.argsort()], y)

    store, log = MemoryStore(), TrainingLog()
    quiet_trainer(LossRecorder(store), log).fit(Stepping(step), loader(IndexedVectors()))
    assert_in_order(store, log)


class DrawingAndMixing(Drawing):
    """Mixes the samples of its second batch, after it has drawn them."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 1:
            loss = loss + cross_entropy(self.net(batch[0] + batch[0].flip(0)), batch[1])
        return loss


def test_draws_are_followed_after_a_batch_that_mixes():
    model = DrawingAndMixing(DRAWS["a permutation"])
    with pytest.warns(UserWarning, match="rows of the batch hold two samples"):
        store, _ = recorded(model)
    ids = [step.sample_ids.tolist() for step in store]
    assert ids[0] == model.seen[0]
    assert ids[2:] == model.seen[2:]


def test_several_recorders_follow_the_same_draws():
    first, second, third = MemoryStore(), MemoryStore(), MemoryStore()
    model = Drawing(DRAWS["a permutation"])
    recorders = GradientRecorder(first), LossRecorder(second), GradientRecorder(third)
    quiet_trainer(*recorders).fit(model, loader(IndexedVectors()))
    for store in (first, second, third):
        assert [step.sample_ids.tolist() for step in store] == model.seen


class StepsByHand(Drawing):
    """Optimizes by hand, with two backward passes per step."""

    def __init__(self, draw):
        super().__init__(draw)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2, retain_graph=True)
        self.manual_backward(loss / 2)
        optimizer.step()


def test_all_passes_of_manual_optimization_have_the_ids_that_were_drawn():
    model = StepsByHand(DRAWS["sorted"])
    store, _ = recorded(model)
    assert [step.sample_ids.tolist() for step in store] == [2 * ids for ids in model.seen]


def test_a_failed_step_leaves_no_trace(tmp_path):
    def step(model, x, y):
        raise RuntimeError("no memory")

    probe = next(iter(loader(IndexedVectors())))
    with pytest.raises(RuntimeError, match="no memory"):
        recorded(Stepping(step))
    callback = ContributionTracker(probe, tmp_path / "contributions.npz")
    with pytest.raises(RuntimeError, match="no memory"):
        quiet_trainer(callback).fit(Stepping(step), loader(IndexedVectors()))
    assert torch.overrides._get_current_function_mode() is None
