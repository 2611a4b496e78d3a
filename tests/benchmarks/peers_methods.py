"""The methods of other libraries that `peers.py` compares, each called as its documentation does.

An adapter takes a training, queries and settings, and returns scores, ``(n_query, n_train)``.
Without settings, it passes what a call needs, and leaves all else at the library's defaults.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import peers_dattri as dattri
import torch
from lds_retraining import Weights
from peers_trained import Trained, loader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from tda_lightning import TRAK, TracIn, attribute, attribute_by_gradients
from tda_lightning.attribution import Attributor
from tda_lightning.full_influence import EKFAC, FullInfluenceFunction

Adapter = Callable[..., Tensor]
Settings = Mapping[str, object]
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        library: Name of the package that must be installed.
        name: Of the method.
        scores: The adapter.
        grid: Other settings, of which the best is shown.
        largest: Number of parameters up to which the method runs in some minutes and gigabytes.
    """

    library: str
    name: str
    scores: Adapter
    grid: Sequence[Settings] = field(default=())
    largest: int | None = None


def over(name: str, values: Sequence[object], **fixed: object) -> list[Settings]:
    """Return one setting per value."""
    return [{name: value, **fixed} for value in values]


# This library


def from_runs(
    models: int, trained: Trained, queries: TensorDataset, method: Attributor | None = None
) -> Tensor:
    """Query the recorded run, or several runs."""
    runs = trained.runs[:models]
    stores, learners = [run.store for run in runs], [run.learner for run in runs]
    arguments = {} if method is None else {"method": method}
    return attribute(stores, learners, queries.tensors, progress=False, **arguments).values


def from_gradients(trained: Trained, queries: TensorDataset) -> Tensor:
    """Compute what kronfluence computes: EKFAC at the final weights, without a run."""
    method = FullInfluenceFunction(EKFAC())
    data = loader(trained.train, trained.task.batch_size)
    learner = trained.run.learner
    return attribute_by_gradients(
        learner, data, queries.tensors, method=method, progress=False
    ).values


# captum


def load_checkpoint(network: nn.Module, path: str) -> float:
    """Load a checkpoint, and return its learning rate, as captum expects."""
    checkpoint = torch.load(path)
    network.load_state_dict(checkpoint["weights"])
    return checkpoint["rate"]


def captum(kind: str, trained: Trained, queries: TensorDataset, **settings: object) -> Tensor:
    """Call TracInCP, of all layers or of the last one, on one checkpoint per epoch."""
    from captum import influence

    if kind == "TracInCP":
        settings["sample_wise_grads_per_batch"] = True
    else:
        settings["final_fc_layer"] = "head"
    tracin = getattr(influence, kind)(
        trained.network(),
        train_dataset=trained.train,
        checkpoints=trained.paths,
        checkpoints_load_func=load_checkpoint,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=100,
        **settings,
    )
    return tracin.influence(queries.tensors)


def captum_influence(
    kind: str, trained: Trained, queries: TensorDataset, **settings: object
) -> Tensor:
    """Call an influence function at the last checkpoint."""
    from captum.influence import NaiveInfluenceFunction
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    kinds = {"Naive": NaiveInfluenceFunction, "Arnoldi": ArnoldiInfluenceFunction}
    function = kinds[kind](
        trained.network(),
        train_dataset=trained.train,
        checkpoint=trained.paths[-1],
        checkpoints_load_func=load_checkpoint,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=len(trained.train),
        sample_wise_grads_per_batch=True,
        **settings,
    )
    return function.influence(queries.tensors)


# kronfluence


def kronfluence(trained: Trained, queries: TensorDataset, **settings: object) -> Tensor:
    """Fit the factors of EKFAC, and compute pairwise scores."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(
            self, batch: Sequence[Tensor], model: nn.Module, sample: bool = False
        ) -> Tensor:
            logits = model(batch[0])
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            return cross_entropy(logits, labels if sample else batch[1], reduction="sum")

        def compute_measurement(self, batch: Sequence[Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)
    task = Classification()
    model = prepare_model(trained.network(), task)
    with tempfile.TemporaryDirectory(dir=trained.folder) as folder:
        analyzer = Analyzer(
            "digits", model, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=40
        )
        analyzer.fit_all_factors("factors", trained.train)
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=queries,
            train_dataset=trained.train,
            per_device_query_batch_size=len(queries),
            score_args=ScoreArguments(**settings),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


# TRAK


def trak(
    trained: Trained, queries: TensorDataset, ensemble: bool = False, **settings: object
) -> Tensor:
    """Featurize the training samples and score the queries, by one model or by five."""
    from trak import TRAKer

    models: list[Weights] = trained.ensemble if ensemble else [trained.final]
    labels = [tuple(part) for part in (trained.train.tensors, queries.tensors)]
    with tempfile.TemporaryDirectory(dir=trained.folder) as folder:
        traker = TRAKer(
            model=trained.network(),
            task="image_classification",
            train_set_size=len(trained.train),
            save_dir=folder,
            device="cpu",
            logging_level=logging.ERROR,
            **settings,
        )
        for number, model in enumerate(models):
            traker.load_checkpoint(model, model_id=number)
            traker.featurize(batch=labels[0], num_samples=len(trained.train))
        traker.finalize_features()
        for number, model in enumerate(models):
            traker.start_scoring_checkpoint("queries", model, number, num_targets=len(queries))
            traker.score(batch=labels[1], num_samples=len(queries))
        return torch.tensor(traker.finalize_scores(exp_name="queries")).T.float()


def methods() -> list[Method]:
    """Return all lines of the table."""
    ours, from_one = partial(Method, "tda_lightning"), partial(from_runs, 1)
    arnoldi = [*over("hessian_reg", [10.0]), *over("hessian_reg", [1.0, 10.0], projection_dim=200)]
    in_single = over("use_half_precision", [False])
    dimensions = over("proj_dim", (128, 512), use_half_precision=False)
    ridges = over("lambda_reg", (10.0, 100.0, 1e3, 1e4), use_half_precision=False)
    return [
        ours("attribute", from_one),
        ours("attribute, five models", partial(from_runs, 5)),
        ours("TracIn", partial(from_one, method=TracIn())),
        ours("TRAK, one model", partial(from_one, method=TRAK())),
        ours("TRAK, five models", partial(from_runs, 5, method=TRAK())),
        ours("EKFAC, without a run", from_gradients),
        Method("captum", "TracInCP", partial(captum, "TracInCP")),
        Method("captum", "TracInCPFast", partial(captum, "TracInCPFast")),
        Method("captum", "ArnoldiInfluenceFunction", partial(captum_influence, "Arnoldi"), arnoldi),
        Method(
            "captum",
            "NaiveInfluenceFunction",
            partial(captum_influence, "Naive"),
            over("projection_dim", (10, 200)),
            largest=2000,
        ),
        *(Method("dattri", *line) for line in dattri.methods()),
        Method("kronfluence", "EKFAC", kronfluence, over("damping_factor", (None, *DAMPINGS))),
        Method("trak", "TRAK, one model", trak, [*in_single, *dimensions, *ridges]),
        Method("trak", "TRAK, five models", partial(trak, ensemble=True), ridges),
    ]
