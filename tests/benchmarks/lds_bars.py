r"""The bars of `lds.py`: influence functions and TRAK with exact gradients, tuned by a grid.

Brute force, without the library: whole gradients from `vmap(grad)`, without sketches. With the
training rows :math:`G`, the query rows :math:`Q` and rows :math:`C` of the curvature,

.. math:: S = Q \left(\tfrac{1}{m} C^\top C + \lambda I\right)^{-1} G^\top
   = \tfrac{1}{\lambda} \left(Q G^\top - Q C^\top (C C^\top + m \lambda I)^{-1} C G^\top\right)

One eigendecomposition of :math:`C C^\top` serves every damping.
"""

from collections.abc import Callable, Iterator

import torch
from lds_retraining import Weights, member_losses
from lds_tasks import Task
from torch import Tensor
from torch.func import functional_call, grad, vmap

DAMPINGS = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
LABEL_DRAWS = 4
Scored = Iterator[tuple[str, Tensor]]
Measure = Callable[[Weights, Tensor, Tensor], Tensor]


def rows_of(measure: Measure, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of a measure of each sample, shape ``(n, parameters)``."""

    trained = {name: value for name, value in weights.items() if not is_buffer(name)}
    buffers = {name: value for name, value in weights.items() if is_buffer(name)}

    def of_sample(values: Weights, sample: Tensor, target: Tensor) -> Tensor:
        return measure({**values, **buffers}, sample[None], target[None]).squeeze(0)

    per_sample = vmap(grad(of_sample), in_dims=(None, 0, 0), chunk_size=100)
    gradients = per_sample(trained, inputs, targets)
    return torch.cat([gradients[name].flatten(1) for name in trained], dim=1)


def is_buffer(name: str) -> bool:
    """Return whether a tensor belongs to the running statistics of a batch norm."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def over_dampings(queries: Tensor, train: Tensor, curvature: Tensor) -> Scored:
    """Yield each damping of the grid with its scores.

    Dampings are shares of the curvature's trace.
    """
    # In double precision: with little damping the two terms nearly cancel.
    queries, train, curvature = queries.double(), train.double(), curvature.double()
    values, vectors = torch.linalg.eigh(curvature @ curvature.mT)
    undamped = queries @ train.mT
    left = queries @ curvature.mT @ vectors
    right = vectors.mT @ (curvature @ train.mT)
    for share in DAMPINGS:
        damping = share * values.sum() / len(curvature)
        floor = len(curvature) * damping
        scores = (undamped - left / (values + floor) @ right) / damping
        yield f"damping {share:.0e} of trace", scores


def influence(task: Task, weights: Weights) -> Scored:
    """Yield influence functions at the final weights, with the empirical Fisher information."""
    losses, data = member_losses(task), task.data()
    train = rows_of(losses, weights, *data.train.tensors)
    queries = rows_of(losses, weights, *data.queries.tensors)
    yield from over_dampings(queries, train, train)


def sampled_influence(task: Task, weights: Weights) -> Scored:
    """Yield influence functions with the Gauss-Newton matrix, estimated from sampled labels."""
    losses, data = member_losses(task), task.data()
    train = rows_of(losses, weights, *data.train.tensors)
    queries = rows_of(losses, weights, *data.queries.tensors)
    inputs = data.train.tensors[0].repeat_interleave(LABEL_DRAWS, dim=0)
    with torch.no_grad():
        outputs = functional_call(task.network().eval(), weights, (inputs,))
    torch.manual_seed(0)
    labels = _sampled_labels(outputs) if task.has_classes else _sampled_numbers(outputs)
    # The gradient is that of a mean over places; the curvature is the mean of those of the places.
    places = labels[0].numel()
    curvature = rows_of(losses, weights, inputs, labels) * places**0.5
    yield from over_dampings(queries, train, curvature)


def _sampled_labels(logits: Tensor) -> Tensor:
    chances = logits.softmax(dim=-1)
    return chances.flatten(0, -2).multinomial(1).reshape(chances.shape[:-1])


def _sampled_numbers(means: Tensor) -> Tensor:
    """Sample from the normal distribution whose negative log-likelihood is the squared error."""
    return means + 0.5**0.5 * torch.randn_like(means)


def trak(task: Task, models: Weights) -> Scored:
    """Yield TRAK of several models: Park et al. (2023), eq. 16, without the random projection."""
    margins, data = margin_of(task), task.data()
    network = task.network().eval()
    summed: dict[str, Tensor] = {}
    misses = torch.zeros(len(data.train))
    for number in range(len(next(iter(models.values())))):
        weights = {name: value[number] for name, value in models.items()}
        train = rows_of(margins, weights, *data.train.tensors)
        queries = rows_of(margins, weights, *data.queries.tensors)
        for name, scores in over_dampings(queries, train, train):
            summed[name] = summed.get(name, 0) + scores
        with torch.no_grad():
            outputs = functional_call(network, weights, (data.train.tensors[0],))
        misses += 1 - _mean_chance(outputs, data.train.tensors[1])
    yield from ((name, scores * misses) for name, scores in summed.items())


def margin_of(task: Task) -> Measure:
    """Return a function that computes the log odds of the targets, averaged over places."""
    network = task.network().eval()

    def margins(weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(network, weights, (inputs,))
        right = targets[..., None]
        others = logits.scatter(-1, right, -torch.inf).logsumexp(dim=-1)
        odds = logits.gather(-1, right).squeeze(-1) - others
        return odds.reshape(len(targets), -1).mean(dim=1)

    return margins


def _mean_chance(outputs: Tensor, targets: Tensor) -> Tensor:
    chances = outputs.softmax(dim=-1).gather(-1, targets[..., None])
    return chances.reshape(len(targets), -1).mean(dim=1)
