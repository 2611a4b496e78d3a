"""Quanda: recorded runs as its explainers, its metrics beside ours, and one of its benchmarks.

It needs a separate environment, since quanda needs NumPy 1: see ``docs/contributing.md``.
"""

import copy

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from tda_lightning import GradientRecorder, Margin, TracIn, attribute, self_influence
from tda_lightning.metrics import (
    class_detection,
    group_detection,
    linear_datamodeling_score,
    mean_reciprocal_rank,
    mislabel_recall,
    model_randomization,
    recall_at_k,
    tail_patch,
    top_k_cardinality,
)
from tda_lightning.results.scores import Scores
from tda_lightning.stores import MemoryStore

pytest.importorskip("quanda", reason="it needs NumPy 1: run `.ci/quanda`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:::(?!tda_lightning)"),  # quanda and what it imports
]


class Model(Plain):
    def forward(self, x):
        return self.net(x)


class Pairs(Dataset):
    """Images with labels that are plain numbers, as quanda expects."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __len__(self):
        return len(self.labels)


def random_scores(n_query=5, n_train=13):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n_query, n_train, generator=generator)


@pytest.fixture(scope="module")
def run():
    store, model = MemoryStore(), Model(mlp())
    data = Subset(vectors(), [8, 2, 5, 11, 0, 3, 12])
    torch.manual_seed(0)
    quiet_trainer(GradientRecorder(store)).fit(model, loader(data))
    return store, model.eval(), data


@pytest.mark.parametrize("target", [Margin(), None], ids=["margin", "loss"])
def test_columns_are_in_the_order_of_the_dataset(run, target):
    from tda_lightning.applications.quanda import RecordedRun

    store, model, data = run
    settings = {} if target is None else {"target": target}
    x, y = vectors()[:5]
    explained = RecordedRun(model, data, store, **settings).explain(x, y.tolist())
    scores = attribute(store, model, [x, y], progress=False, **settings)
    assert scores.train_ids.tolist() == sorted(data.indices)
    for column, sample_id in enumerate(data.indices):
        expected = scores.values[:, scores.train_ids.tolist().index(sample_id)]
        torch.testing.assert_close(explained[:, column], expected)


def test_ids_may_be_passed_and_unknown_ones_are_refused(run):
    from tda_lightning.applications.quanda import RecordedRun

    store, model, data = run
    part = TensorDataset(*vectors()[[5, 0]])
    x, y = vectors()[:3]
    explained = RecordedRun(model, part, store, train_ids=[5, 0]).explain(x, y)
    every = RecordedRun(model, data, store).explain(x, y)
    torch.testing.assert_close(explained, every[:, [2, 4]])
    with pytest.raises(ValueError, match="Sample 1 of `train_dataset`"):
        RecordedRun(model, part, store)


def test_self_influence_keeps_its_order_in_the_ranking_of_quanda(run):
    from quanda.explainers.global_ranking import SelfInfluenceRanking

    from tda_lightning.applications.quanda import RecordedRun, spaced_ranks

    store, model, data = run
    ranking = SelfInfluenceRanking(RecordedRun(model, data, store)).get_global_rank()
    best = self_influence(store, progress=False).highest(len(data)).ids
    assert [data.indices[int(position)] for position in ranking] == best.tolist()
    values = torch.randperm(30_011, generator=torch.Generator().manual_seed(1)) * 1e-9
    ranking = SelfInfluenceRanking(self_influence=spaced_ranks(values)).get_global_rank()
    assert torch.equal(ranking.long(), values.argsort(descending=True))


def test_class_and_subclass_detection_are_those_of_quanda():
    from quanda.metrics.downstream_eval import ClassDetectionMetric, SubclassDetectionMetric

    data, scores = vectors(), random_scores()
    labels, query_labels = data.tensors[1], torch.tensor([0, 2, 1, 1, 0])
    metric = ClassDetectionMetric(mlp(), data, s=3)
    metric.update(scores, query_labels)
    expected = metric.compute()["score"]
    assert class_detection(scores, query_labels, labels, k=3) == pytest.approx(expected)
    subclasses = torch.arange(13) % 5
    metric = SubclassDetectionMetric(mlp(), data, subclasses, s=3)
    metric.update(scores, query_labels)
    expected = metric.compute()["score"]
    assert class_detection(scores, query_labels, subclasses, k=3) == pytest.approx(expected)


def test_shortcut_detection_and_mixed_data_sets_are_those_of_quanda():
    from quanda.metrics.downstream_eval import ShortcutDetectionMetric
    from quanda.metrics.heuristics import MixedDatasetsMetric

    data, scores = vectors(), random_scores()
    of_class = (data.tensors[1] == 1).nonzero()[:, 0]
    members = torch.zeros(13, dtype=torch.bool)
    members[of_class[:2]] = True
    ours = float(group_detection(scores, members).mean())
    settings = {"filter_by_non_shortcut": False, "filter_by_shortcut_pred": False}
    metric = ShortcutDetectionMetric(mlp(), data, of_class[:2].tolist(), 1, **settings)
    metric.update(scores)
    assert metric.compute()["score"] == pytest.approx(ours)
    metric = MixedDatasetsMetric(mlp(), data, members.long())
    metric.update(scores)
    assert metric.compute()["score"] == pytest.approx(ours)


def test_retrieval_and_cardinality_are_those_of_quanda():
    from quanda.metrics.downstream_eval import MRRMetric, RecallAtKMetric
    from quanda.metrics.heuristics import TopKCardinalityMetric

    scores = random_scores()
    relevant = torch.rand(5, 13, generator=torch.Generator().manual_seed(4)) < 0.2
    relevant[3] = False
    metric = MRRMetric(mlp(), vectors())
    metric.update(scores, relevant)
    assert mean_reciprocal_rank(scores, relevant) == pytest.approx(metric.compute()["score"])
    metric = RecallAtKMetric(mlp(), vectors(), k=3)
    metric.update(scores, relevant)
    assert recall_at_k(scores, relevant, k=3) == pytest.approx(metric.compute()["score"])
    metric = TopKCardinalityMetric(mlp(), vectors(), top_k=3)
    metric.update(scores)
    assert top_k_cardinality(scores, k=3) == pytest.approx(metric.compute()["score"])


def test_the_detection_curve_of_quanda_is_the_recall_at_each_number():
    from quanda.metrics.downstream_eval import MislabelingDetectionMetric

    values, wrong = random_scores()[0], [4, 7, 11]
    mask = torch.zeros(13, dtype=torch.bool)
    mask[wrong] = True
    metric = MislabelingDetectionMetric(
        mlp(), vectors(), wrong, precomputed_self_influence=values.double()
    )
    recalls = [mislabel_recall(values, mask, k / 13) for k in range(1, 14)]
    torch.testing.assert_close(metric.compute()["curve"], torch.tensor(recalls))


def test_the_datamodeling_score_is_that_of_quanda_for_margins():
    from quanda.metrics.ground_truth import LinearDatamodelingMetric

    scores, generator = random_scores(), torch.Generator().manual_seed(6)
    logits = torch.randn(11, 5, 3, generator=generator)  # after each retraining, of each query
    labels = torch.tensor([0, 2, 1, 1, 0])
    subsets = [torch.randperm(13, generator=generator)[:7].tolist() for _ in range(11)]
    metric = LinearDatamodelingMetric(
        mlp(), vectors(), m=11, subset_ids=subsets, subset_ckpt_filenames=["none"] * 11
    )
    metric.update(scores, labels, None, subset_logits=dict(enumerate(logits)))
    kept = torch.zeros(11, 13, dtype=torch.bool)
    for mask, subset in zip(kept, subsets, strict=True):
        mask[subset] = True
    p = logits.softmax(dim=-1)[:, torch.arange(5), labels]
    ours = linear_datamodeling_score(scores, kept, losses=-torch.logit(p))
    torch.testing.assert_close(torch.cat(metric.results["scores"]).double(), ours)
    assert float(ours.mean()) == pytest.approx(metric.compute()["score"], abs=1e-6)


def test_model_randomization_is_that_of_quanda(run, tmp_path):
    from quanda.metrics.heuristics import ModelRandomizationMetric

    from tda_lightning.applications.quanda import RecordedRun

    store, model, data = run
    torch.save(model.state_dict(), tmp_path / "model.pt")
    metric = ModelRandomizationMetric(
        model=model,
        model_id="model",
        cache_dir=str(tmp_path),
        train_dataset=data,
        checkpoints=str(tmp_path / "model.pt"),
        explainer_cls=RecordedRun,
        expl_kwargs={"run": store, "method": TracIn()},
    )
    x, y = vectors()[:5]
    explained = RecordedRun(model, data, store, method=TracIn()).explain(x, y)
    metric.update(explained, x, y)
    both = [
        Scores(values, torch.arange(5), torch.arange(7), "TracIn()")
        for values in (explained, metric.rand_explainer.explain(x, y))
    ]
    assert model_randomization(*both) == pytest.approx(metric.compute()["score"], abs=1e-6)


def test_the_tail_patch_is_that_of_quanda(tmp_path):
    import transformers
    from quanda.metrics.downstream_eval import TailPatchMetric
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=11,
            n_positions=7,
            n_embd=6,
            n_layer=1,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()
    tokens = torch.randint(11, (5, 7))
    passages = [{"input_ids": row, "labels": row} for row in tokens]
    queries = torch.randint(11, (3, 7))
    labels = queries.clone()
    labels[:, :-2] = -100
    scores = random_scores(3, 5)
    settings = {"k": 2, "learning_rate": 0.01, "optimizer_class": torch.optim.SGD}
    metric = TailPatchMetric(model, passages, tokenizer_name=str(tmp_path), **settings)
    mask = torch.ones_like(queries)
    metric.update(scores, {"input_ids": queries, "attention_mask": mask}, labels)

    def log_probability(network, row):
        with torch.no_grad():
            logits = network.eval()(queries[row : row + 1]).logits.log_softmax(dim=-1)[0]
        return sum(logits[at - 1, queries[row, at]] for at in (5, 6))

    before = torch.stack([log_probability(model, row) for row in range(3)])
    after = torch.empty(3, 2)
    for row, best in enumerate(scores.topk(2, dim=1).indices):
        for column, passage in enumerate(best):
            patched = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(patched.parameters(), lr=0.01)
            patched(tokens[passage][None], labels=tokens[passage][None]).loss.backward()
            optimizer.step()
            after[row, column] = log_probability(patched, row)
    ours = tail_patch(before, after)
    torch.testing.assert_close(torch.tensor(metric.scores).double(), ours, atol=1e-7, rtol=1e-3)


def test_a_benchmark_of_quanda_is_recorded_as_trained_and_evaluated(tmp_path, monkeypatch):
    from quanda.benchmarks.downstream_eval import MislabelingDetection
    from quanda.utils.datasets.transformed import LabelFlippingDataset
    from quanda.utils.datasets.transformed.metadata import LabelFlippingMetadata
    from quanda.utils.training import Trainer

    from tda_lightning.applications.quanda import RecordedRun

    monkeypatch.setenv("TDA_LIGHTNING_STORE", str(tmp_path / "run.tda"))
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    pairs = Pairs(torch.tensor(digits.data).float() / 16, digits.target.tolist())
    train = LabelFlippingDataset(Subset(pairs, range(1000)), LabelFlippingMetadata(p=0.1, seed=1))
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    trainer = Trainer(torch.optim.AdamW, 3e-3, 15, nn.CrossEntropyLoss(), enable_progress_bar=False)
    trainer.fit(network, loader(train, 50))
    torch.save(network.state_dict(), "network.pt")
    benchmark = MislabelingDetection(
        model=network,
        train_dataset=train,
        eval_dataset=Subset(pairs, range(1000, 1797)),
        checkpoints=["network.pt"],
        checkpoints_load_func=lambda model, path: model.load_state_dict(torch.load(path)),
    )
    result = benchmark.evaluate(RecordedRun, {"run": tmp_path / "run.tda"})
    wrong = torch.zeros(1000, dtype=torch.bool)
    wrong[train.transform_indices] = True
    values = self_influence(tmp_path / "run.tda", progress=False).values
    recalls = [mislabel_recall(values, wrong, k / 1000) for k in (50, 100, 200)]
    torch.testing.assert_close(result["curve"][[49, 99, 199]], torch.tensor(recalls))
    assert result["score"] > 0.85  # 0.95 is perfect, 0.5 chance
