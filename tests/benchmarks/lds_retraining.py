"""Retrain many networks at once, with the same steps as Lightning would take for each of them.

The parameters and buffers of all members are stacked along a first axis, and `vmap` maps forward
and backward pass over it. The optimizers of torch act on each entry separately. One optimizer for
the stacked parameters therefore updates each member as if it were alone.
"""

from collections.abc import Callable, Sequence

import torch
from lds_tasks import Task, sample_losses
from torch import Tensor, nn
from torch.func import functional_call, vmap

from tda_lightning.passes.model_state import Mode

Weights = dict[str, Tensor]


def initial_weights(task: Task, seed: int) -> Weights:
    """Return the initial weights of a training with this seed, and its initial buffers."""
    torch.manual_seed(seed)
    return state_of(task.network())


def state_of(network: nn.Module) -> Weights:
    """Return the weights of a network, and its buffers."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {name: value.detach().clone() for name, value in tensors}


def stacked(weights: Weights, members: int) -> Weights:
    """Return the same weights for every member."""
    return {name: value.expand(members, *value.shape).clone() for name, value in weights.items()}


def member_losses(task: Task, mode: Mode = "eval") -> Callable[[Weights, Tensor, Tensor], Tensor]:
    """Return the function from one member's weights and a batch to the losses of its samples."""
    network = task.network().train(mode == "train")

    def losses(weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        return sample_losses(functional_call(network, weights, (inputs,)), targets)

    return losses


def retrain(
    task: Task,
    initial: Weights,
    batches: Sequence[Tensor],
    weighting: Tensor,
    progress: Callable[[], object] = lambda: None,
) -> Weights:
    """Train every member of an ensemble.

    Args:
        task: What to train.
        initial: Stacked weights to start from.
        batches: Indices of the samples of each step, shape ``(members, n)``, or ``(n,)`` if all
            members draw the same.
        weighting: Factors of the samples' losses before the mean over the batch, shape
            ``(members, n_train)``; zero for those left out.
        progress: Called after every step.

    Returns:
        Stacked weights after the last step.
    """
    inputs, targets = task.data().train.tensors
    trained = {name for name, _ in task.network().named_parameters()}
    values = {name: v.clone().requires_grad_(name in trained) for name, v in initial.items()}
    optimizer = task.optimizer([values[name] for name in values if name in trained])
    schedule = task.schedule(optimizer, len(batches))
    losses_of = member_losses(task, "train")
    for batch in batches:
        data_axis = 0 if batch.ndim == 2 else None
        losses = vmap(losses_of, in_dims=(0, data_axis, data_axis))(
            values, inputs[batch], targets[batch]
        )  # (members, n)
        factors = weighting.gather(1, batch.expand(len(weighting), -1))
        # Divide by the size of the whole batch, so that only the sample's own term is left out.
        (losses * factors).mean(dim=1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress()
    return {name: value.detach() for name, value in values.items()}


def query_losses(task: Task, weights: Weights) -> Tensor:
    """Return every member's loss on every query, shape ``(members, n_query)``."""
    inputs, targets = task.data().queries.tensors
    with torch.no_grad():
        return vmap(member_losses(task), in_dims=(0, None, None))(weights, inputs, targets)


def shuffled_batches(included: Tensor, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the batches of each step if every member shuffles its samples for every pass.

    Args:
        included: Mask of each member's samples, the same number for each, shape
            ``(members, n_train)``.
        batch_size: Samples per step.
        steps: Number of steps.
        seed: Seed of the order.
    """
    samples = included.nonzero()[:, 1].unflatten(0, (len(included), -1))  # (members, n_included)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.rand(samples.shape, generator=generator).argsort(dim=1)
        batches += samples.gather(1, order).split(batch_size, dim=1)
    return batches[:steps]
