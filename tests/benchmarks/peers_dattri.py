"""The methods of dattri for `peers.py`.

Its documentation recommends one batch of all training samples for influence functions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lds_retraining import Weights
from peers_trained import Trained, loader
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

Line = tuple[str, Callable[..., Tensor], Sequence[Mapping[str, object]], int | None]
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


def task_of(
    trained: Trained, checkpoints: Weights | list[Weights], measure: str = "loss"
) -> object:
    """Describe model, loss and checkpoints, as every method of dattri needs them."""
    from dattri.task import AttributionTask

    model = trained.network()

    def loss(parameters: Weights, pair: Sequence[Tensor]) -> Tensor:
        outputs = functional_call(model, parameters, (pair[0],))
        return cross_entropy(outputs, pair[1].long())

    def loss_of_sample(parameters: Weights, pair: Sequence[Tensor]) -> Tensor:
        return loss(parameters, (pair[0][None], pair[1][None]))

    def log_odds(parameters: Weights, pair: Sequence[Tensor]) -> Tensor:
        log_probability = -loss_of_sample(parameters, pair)
        return log_probability - torch.log(1 - torch.exp(log_probability))

    def probability(parameters: Weights, pair: Sequence[Tensor]) -> Tensor:
        return torch.exp(-loss_of_sample(parameters, pair))

    measures = {"loss": loss, "loss of sample": loss_of_sample, "log odds": log_odds}
    task = AttributionTask(loss_func=measures[measure], model=model, checkpoints=checkpoints)
    task.probability = probability
    return task


def influence(kind: str, trained: Trained, queries: TensorDataset, **settings: object) -> Tensor:
    """Call an influence function at the final weights."""
    from dattri.algorithm import influence_function

    torch.manual_seed(0)
    task = task_of(trained, trained.final)
    attributor = getattr(influence_function, f"IFAttributor{kind}")(task=task, **settings)
    attributor.cache(loader(trained.train))
    scores = attributor.attribute(loader(trained.train), loader(queries))
    return scores.detach().T


def tracin(trained: Trained, queries: TensorDataset, *, normalized_grad: bool = False) -> Tensor:
    """Call TracIn with one checkpoint per epoch, weighted by its learning rate."""
    from dattri.algorithm.tracin import TracInAttributor

    attributor = TracInAttributor(
        task=task_of(trained, trained.checkpoints(), "loss of sample"),
        weight_list=torch.tensor(trained.rates),
        normalized_grad=normalized_grad,
    )
    return attributor.attribute(loader(trained.train), loader(queries)).T


def trak(
    trained: Trained,
    queries: TensorDataset,
    ensemble: bool = False,
    proj_dim: int | None = None,
    **settings: object,
) -> Tensor:
    """Call TRAK, by one model or by five."""
    from dattri.algorithm.trak import TRAKAttributor

    task = task_of(trained, trained.ensemble if ensemble else trained.final, "log odds")
    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=task.probability,
        # The library changes its default in place; so name it.
        projector_kwargs={"proj_dim": proj_dim or 512},
        **settings,
    )
    with torch.no_grad():
        attributor.cache(loader(trained.train))
        return attributor.attribute(loader(queries)).T


def embeddings(
    trained: Trained, queries: TensorDataset, is_mean: bool = False, **settings: object
) -> Tensor:
    """Train again, collect the gradients of each step, and call data value embeddings.

    Args:
        trained: The training.
        queries: The queries.
        is_mean: Pass the rate of each sample, divided by the size of the batch.
        settings: For the library.
    """
    from dattri.algorithm.dvemb import DVEmbAttributor

    attributor = DVEmbAttributor(task=task_of(trained, trained.final, "loss of sample"), **settings)
    model = attributor.model
    model.load_state_dict(trained.run.initial)
    optimizer = trained.task.optimizer(model.parameters())
    schedule = trained.task.schedule(optimizer, trained.task.steps)
    steps_per_epoch = trained.task.steps // trained.task.epochs
    for number, (indices, inputs, labels) in enumerate(trained.batches()):
        rate = optimizer.param_groups[0]["lr"] / (len(indices) if is_mean else 1)
        epoch = number // steps_per_epoch
        attributor.cache_gradients(epoch, (inputs, labels), indices, rate)
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    attributor.cache()
    return attributor.attribute(loader(queries)).detach().T


def methods() -> list[Line]:
    """Return name, adapter, grid and largest number of parameters of each method."""
    regularized = [{"regularization": value} for value in DAMPINGS]
    dimensions = [{"proj_dim": value} for value in (128, 256)]
    ridges = [{"regularization": value} for value in (1e-2, 1e-1, 1.0, 10.0)]
    damped = [{"damping": value} for value in DAMPINGS]
    # The library takes square roots of the top eigenvalues; some are negative.
    arnoldi = [*({"proj_dim": value} for value in (10, 30, 50)), *regularized[2:]]
    projected = partial(embeddings, proj_dim=1024)
    return [
        ("TracInAttributor", tracin, [{"normalized_grad": True}], None),
        ("IFAttributorExplicit", partial(influence, "Explicit"), regularized, 2000),
        ("IFAttributorCG", partial(influence, "CG"), regularized, None),
        ("IFAttributorArnoldi", partial(influence, "Arnoldi"), arnoldi, None),
        ("IFAttributorLiSSA", partial(influence, "LiSSA"), [{"damping": 1e-3}], 2000),
        ("IFAttributorDataInf", partial(influence, "DataInf"), regularized, None),
        ("IFAttributorEKFAC", partial(influence, "EKFAC"), damped, None),
        ("TRAKAttributor, one model", trak, [*dimensions, *ridges], None),
        ("TRAKAttributor, five models", partial(trak, ensemble=True), ridges, None),
        ("DVEmbAttributor", embeddings, (), 2000),
        ("DVEmbAttributor, proj_dim=1024", projected, [{"is_mean": True}], None),
    ]
