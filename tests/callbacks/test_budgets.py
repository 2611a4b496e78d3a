"""Budgets of disk and of time choose the stride of recording and change nothing else."""

import re
import time

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, Plain, loader, mlp, quiet_trainer, vectors
from manual_models import Manual
from networks import Checkpointed
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder, HDF5Store, Identity, TracIn, attribute, node_rule
from tda_lightning.recording.timing import BatchTiming
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import same

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:.*steps before this checkpoint are not in the store"),
]
# A limit that no step of these small models exceeds, and one that every step exceeds.
LOOSE, TIGHT = 1e6, 1e-6


@pytest.mark.parametrize(
    ("max_gb", "stride"), [(1.0, 1), (78 * 604 / 2.5e9, 3), (78 * 604 / 4.5e9, 5)]
)
def test_a_budget_of_disk_chooses_the_stride(max_gb, stride, caplog):
    store = MemoryStore()
    recorder = GradientRecorder(store, max_gb=max_gb)
    with caplog.at_level("INFO"):
        quiet_trainer(recorder, max_epochs=6).fit(Plain(mlp()), loader(IndexedVectors()))
    assert store.recipe.every_n_steps == stride
    assert [step.index for step in store] == list(range(0, 18, stride))
    assert (f"one step in {stride}" in caplog.text) == (stride > 1)


def test_a_budget_of_disk_needs_the_number_of_steps():
    recorder = GradientRecorder(MemoryStore(), max_gb=1.0, sample_ids=lambda batch: range(5))
    with pytest.raises(ValueError, match="`max_gb` cannot be kept"):
        quiet_trainer(recorder).fit(Plain(mlp()), DataLoader(vectors(), batch_size=5))


@pytest.mark.parametrize("overhead", [0.001, 0.1, 0.34, 1.0, 2.7])
@pytest.mark.parametrize("limit", [0.01, 0.1, 0.5, 10.0])
def test_the_stride_is_the_smallest_within_the_limit(overhead, limit):
    timing = BatchTiming(batch=0.02, recording=0.02 * overhead)
    stride = timing.stride_within(limit)
    assert timing.overhead / stride <= limit
    assert stride == 1 or timing.overhead / (stride - 1) > limit


def train(recorder=None, *callbacks, optimizer=torch.optim.AdamW, resume=None, **settings):
    pl.seed_everything(5, verbose=False)
    net = torch.nn.Sequential(mlp(), torch.nn.Dropout(0.2))
    model = Plain(net, optimizer=lambda p: optimizer(p, lr=0.01))
    recorders = [] if recorder is None else [recorder]
    trainer = quiet_trainer(*recorders, *callbacks, **{"max_epochs": 3, **settings})
    trainer.fit(model, loader(IndexedVectors()), ckpt_path=resume)
    return model


RECORDINGS = [{}, {"curvature": "fisher"}, {"curvature": "fisher", "curvature_share": 0.4}]


@pytest.mark.parametrize("recording", RECORDINGS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}],
    ids=str,
)
@pytest.mark.parametrize("limit", [LOOSE, TIGHT], ids=["loose", "tight"])
def test_weights_are_bit_identical_under_a_budget_of_time(limit, settings, recording):
    plain, next_random = train(**settings), torch.rand(1)
    recorder = GradientRecorder(MemoryStore(), max_overhead=limit, **recording)
    recorded = train(recorder, **settings)
    assert torch.equal(torch.rand(1), next_random)
    for expected, weight in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("recording", RECORDINGS, ids=str)
def test_a_budget_of_time_does_not_change_the_recorded_steps(recording):
    """Labels are sampled from a separate random stream, so they do not depend on the budget."""
    plain, limited = MemoryStore(), MemoryStore()
    train(GradientRecorder(plain, projector=Identity(), every_n_steps=2, audit=2, **recording))
    train(
        GradientRecorder(
            limited,
            projector=Identity(),
            every_n_steps=2,
            max_overhead=LOOSE,
            audit=2,
            **recording,
        )
    )
    assert limited.recipe == plain.recipe
    assert len(limited) == len(plain) == 5
    assert all(map(same, limited, plain))


class LogBeforeFirstStep(pl.Callback):
    """Store the text that is logged before the first optimizer step."""

    def __init__(self, caplog):
        self.caplog, self.text = caplog, None

    def on_before_optimizer_step(self, *_):
        self.text = self.text or self.caplog.text


@pytest.mark.parametrize("batches", [1, 3])
def test_only_the_first_batch_logs_the_time_of_recording(batches, caplog):
    before_first_step = LogBeforeFirstStep(caplog)
    with caplog.at_level("DEBUG", logger="tda_lightning"):
        train(GradientRecorder(MemoryStore()), before_first_step, accumulate_grad_batches=batches)
    messages = re.findall(
        r"a batch takes about [\d.]+ m?s, recording it adds about [\d.]+ m?s \(\d+ %\)\. "
        r"It was measured in the first batch.*`max_overhead`",
        before_first_step.text,
    )
    assert len(messages) == 1
    assert caplog.text.count("a batch takes about") == 1


def test_the_logged_times_are_those_of_the_batch_and_of_its_rows(caplog):
    """An operation sleeps 50 ms in its forward pass, and 200 ms when its rows are computed."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            time.sleep(0.05)
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad * weight, (grad * x).sum(dim=0)

    @node_rule("ScaleBackward")
    def _scale(call):
        time.sleep(0.2)
        return call.grad * call.node.saved_tensors[0]

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(7))

        def forward(self, x):
            return Scale.apply(x, self.weight)

    with caplog.at_level("DEBUG", logger="tda_lightning"):
        net = torch.nn.Sequential(Slow(), torch.nn.Linear(7, 3))
        quiet_trainer(GradientRecorder(MemoryStore()), max_steps=2).fit(
            Plain(net), loader(IndexedVectors())
        )
    times = re.findall(r"about ([\d.]+) (m?s)\b", caplog.text)
    batch, recording = (float(number) * {"ms": 1, "s": 1000}[unit] for number, unit in times)
    assert batch >= 50
    assert recording >= 200


@pytest.mark.parametrize("make", [lambda _: MemoryStore(), lambda folder: HDF5Store(folder / "r")])
def test_the_stride_is_logged_before_the_first_step_and_stored(make, tmp_path, caplog):
    store, before_first_step = make(tmp_path), LogBeforeFirstStep(caplog)
    with caplog.at_level("INFO"):
        train(GradientRecorder(store, max_overhead=TIGHT), before_first_step)
    message = re.search(
        r"recording one step in ([\d,]+) .* MiB .*adds no more than 0\.0001 % of time\. Limit its "
        r"size with `max_gb`\.",
        before_first_step.text,
    )
    stride = int(message[1].replace(",", ""))
    assert stride > 9
    assert store.recipe.every_n_steps == stride
    assert [step.index for step in store] == [0]
    assert caplog.text.count(" MiB for ") == 1  # Once, after the stride is known.
    if isinstance(store, HDF5Store):
        assert HDF5Store.open(store.path).recipe.every_n_steps == stride


def test_every_step_is_recorded_within_a_loose_limit(caplog):
    store = MemoryStore()
    with caplog.at_level("INFO"):
        train(GradientRecorder(store, max_overhead=LOOSE))
    assert "recording every step" in caplog.text
    assert store.recipe.every_n_steps == 1
    assert [step.index for step in store] == list(range(9))


@pytest.mark.parametrize("settings", [{"every_n_steps": 3}, {"max_gb": 39 * 604 / 2.5e9}], ids=str)
def test_the_larger_stride_wins(settings):
    store = MemoryStore()
    train(GradientRecorder(store, max_overhead=LOOSE, preconditioner="none", **settings))
    assert store.recipe.every_n_steps == 3
    assert [step.index for step in store] == [0, 3, 6]
    tight = MemoryStore()
    train(GradientRecorder(tight, max_overhead=TIGHT, **settings))
    assert tight.recipe.every_n_steps > 9


def test_a_chosen_stride_gives_the_scores_of_the_same_given_stride():
    chosen, given = MemoryStore(), MemoryStore()
    train(GradientRecorder(chosen, max_overhead=TIGHT))
    stride = chosen.recipe.every_n_steps
    model = train(GradientRecorder(given, every_n_steps=stride))
    scores = [
        attribute(store, model, vectors()[:3], method=TracIn(), progress=False)
        for store in (chosen, given)
    ]
    assert torch.equal(scores[0].values, scores[1].values)
    assert scores[0].values.abs().max() > 0


@pytest.mark.parametrize("limits", [(LOOSE, TIGHT), (TIGHT, LOOSE)], ids=["loose", "tight"])
def test_a_resumed_run_keeps_its_stride(limits, tmp_path, caplog):
    first, then = limits
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    train(GradientRecorder(tmp_path / "run", max_overhead=first), saver, enable_checkpointing=True)
    stride = HDF5Store.open(tmp_path / "run").recipe.every_n_steps
    with caplog.at_level("INFO"):
        train(
            GradientRecorder(tmp_path / "run", max_overhead=then), resume=tmp_path / "step=4.ckpt"
        )
    assert "a batch takes" not in caplog.text.split("Restored")[-1]
    store = HDF5Store.open(tmp_path / "run")
    assert store.recipe.every_n_steps == stride
    assert len({step.index for step in store}) == len(store) == (9 if first == LOOSE else 1)


def test_the_stride_of_a_replaced_run_is_ignored(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    train(GradientRecorder(MemoryStore()), saver, enable_checkpointing=True)
    other = MemoryStore()
    train(GradientRecorder(other))
    recorder = GradientRecorder(other, max_overhead=TIGHT, existing="replace")
    train(recorder, resume=tmp_path / "step=4.ckpt")
    assert other.recipe.every_n_steps > 9


def test_a_run_that_begins_at_a_checkpoint_records_no_step_off_its_stride(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    train(None, saver, enable_checkpointing=True)
    store = MemoryStore()
    train(GradientRecorder(store, max_overhead=TIGHT), resume=tmp_path / "step=4.ckpt")
    assert store.recipe.every_n_steps > 9
    assert len(store) == 0


def test_a_budget_of_time_in_manual_optimization_is_refused():
    store = MemoryStore()
    with pytest.raises(ValueError, match="`max_overhead` cannot be kept in manual optimization"):
        quiet_trainer(GradientRecorder(store, max_overhead=0.1)).fit(
            Manual(), loader(IndexedVectors())
        )
    assert store.run_id is None


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.passes = 0
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.passes += 1
        if ctx.passes > 1:
            raise RuntimeError("this graph is gone")
        return grad


def test_a_graph_without_a_second_backward_pass_is_refused():
    recorder = GradientRecorder(MemoryStore(), max_overhead=0.1)
    model = Plain(mlp(), lambda outputs, y: OnceOnly.apply(functional.cross_entropy(outputs, y)))
    with pytest.raises(ValueError, match=r"`max_overhead` cannot be kept.*this graph is gone"):
        quiet_trainer(recorder).fit(model, loader(vectors()))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_budget_of_time_holds_for_reentrant_checkpoints():
    store = MemoryStore()
    recorder = GradientRecorder(store, max_overhead=100.0)
    quiet_trainer(recorder).fit(Plain(Checkpointed(True)), loader(vectors()))
    assert len(store) > 0


@pytest.mark.parametrize("limit", [0.0, -0.1, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="expected a share of the time of training above 0"):
        GradientRecorder(MemoryStore(), max_overhead=limit)
