"""Dense gradients and curvature by torch.func: slow, simple references for the solvers."""

from typing import Any

import torch
from lightning_models import Plain
from torch import Tensor
from torch.func import functional_call, hessian, jacrev

N, N_QUERY = 11, 3


class DenseObjective:
    """A model's objective as a function of all its parameters in one vector.

    Args:
        model: The model.
        x: Inputs of the training data.
        y: Labels of the training data.
    """

    def __init__(self, model: Plain, x: Tensor, y: Tensor) -> None:
        self._model, self._x, self._y = model.eval(), x, y
        self._named = dict(model.net.named_parameters())
        self.weights = torch.cat([weight.detach().flatten() for weight in self._named.values()])

    def outputs(self, weights: Tensor, x: Tensor) -> Tensor:
        parts = torch.split(weights, [weight.numel() for weight in self._named.values()])
        pairs = zip(self._named.items(), parts, strict=True)
        named = {name: part.view(weight.shape) for (name, weight), part in pairs}
        return functional_call(self._model.net, named, (x,))

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of each sample's loss, ``(n, d)``."""

        def losses(weights: Tensor) -> Tensor:
            outputs = self.outputs(weights, x)
            pairs = zip(outputs.split(1), y.split(1), strict=True)
            return torch.stack([self._model.loss(*pair) for pair in pairs])

        return jacrev(losses)(self.weights)

    def hessian(self) -> Tensor:
        # Two backward passes, since torch.func differentiates layer norms incorrectly.
        return torch.autograd.functional.hessian(self._loss_at, self.weights)

    def gauss_newton(self) -> Tensor:
        def flat(weights: Tensor) -> Tensor:
            return self.outputs(weights, self._x).flatten()

        outputs = self.outputs(self.weights, self._x).detach()
        jacobian = jacrev(flat)(self.weights)
        inner = hessian(self._loss_of_outputs)(outputs).reshape(outputs.numel(), -1)
        return jacobian.mT @ inner @ jacobian

    def _loss_at(self, weights: Tensor) -> Tensor:
        return self._model.loss(self.outputs(weights, self._x), self._y)

    def _loss_of_outputs(self, outputs: Tensor) -> Tensor:
        return self._model.loss(outputs, self._y)

    def scores(self, matrix: Tensor, damping: float, x: Tensor, y: Tensor) -> Tensor:
        """Return the influence of the training data on queries, ``(n_query, n)``."""
        identity = torch.eye(len(matrix), dtype=matrix.dtype)
        solved = torch.linalg.solve(matrix + damping * identity, self.gradients(x, y).mT)
        return solved.mT @ self.gradients(self._x, self._y).mT / len(self._x)


def to_dense(operator: Any) -> Tensor:
    """Return the matrix of an operator."""
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def regression(n: int = N, d: int = 7, c: int = 2, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Return inputs and targets in float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, c))
