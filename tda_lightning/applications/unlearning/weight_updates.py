r"""Weight updates that remove the influence of some training samples.

Let :math:`F` be the forgotten samples and :math:`g_i` the gradient of a sample's loss.

.. math:: \text{first order:} \quad \theta + \tau \sum_{i \in F} g_i, \qquad
   \text{second order:} \quad \theta + \tfrac{1}{n} (H + \delta I)^{-1} \sum_{i \in F} g_i

Warnecke et al. (2023), "Machine Unlearning of Features and Labels", eqs. 5 and 6, for deletion
without replacement. Along a run that has snapshots, the second order uses means over the snapshots,
in the coordinates of the optimizer: at the end, fitted samples have almost no gradient left.

**Unrolled**: the displacement that the absence of the rows of :math:`F` causes, carried forward
through the recorded steps,

.. math:: \Delta_{t+1} = (I - \eta_t H_t) \Delta_t
   + \eta_t \sum_{i \in F \cap B_t} g_i^{(t)}

This is the forward form of :class:`~tda_lightning.Unrolled` (Hara et al. 2019, algorithm 1). It
needs rows that are not compressed, since a sketch cannot be turned back into weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.attribution.dynamics.curvature import BestAvailable, Curvature
from tda_lightning.attribution.dynamics.optimizer import (
    Dynamics,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.dynamics.propagator import Exponential, LimitedCurvature, Propagator
from tda_lightning.full_influence.attribute import suggested_full_damping
from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.full_gradients import FullGradients
from tda_lightning.full_influence.influence import FullInfluenceFunction
from tda_lightning.full_influence.solvers import Solver
from tda_lightning.full_influence.woodbury import Woodbury
from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_kind, require_positive


@dataclass(frozen=True)
class ForgettingTask:
    """The samples to forget, and all that an update may use.

    Attributes:
        selection: The parameters that the update moves.
        run: The recorded training.
        forget: The samples to forget.
        retain: The other training samples.
        train_loader: All training samples.
    """

    model: nn.Module
    selection: ParameterSelection
    run: Store
    forget_ids: Int[Tensor, " n_forget"]
    forget: DataLoader[Any]
    retain: DataLoader[Any]
    train_loader: DataLoader[Any]
    progress: bool

    def gradients(self, run: Store | None) -> FullGradients:
        """Return the full gradients along a run, or at the current weights without one."""
        recipe = self.run.recipe
        return FullGradients(self.model, self.selection, run, recipe.reduction, recipe.batch_dims)

    def current_gradients(self) -> FullGradients:
        """Return the full gradients at the current weights, in the run's last coordinates."""
        return FullGradients.at_current_weights(self.model, self.selection, self.run)


class WeightUpdate(ABC):
    """A rule that moves weights to where they would be without some samples."""

    @abstractmethod
    def displacement(self, task: ForgettingTask) -> Float[Tensor, " d"]:
        """Return the change of the parameters, one after the other, each flattened."""


@dataclass(frozen=True)
class FirstOrder(WeightUpdate):
    """A gradient step up the loss of the forgotten samples.

    The cheapest update, and the least accurate. Too large a rate destroys the model.

    Attributes:
        rate: Multiple of the summed gradients.
    """

    rate: float

    def __post_init__(self) -> None:
        require_positive("rate", self.rate)

    def displacement(self, task: ForgettingTask) -> Float[Tensor, " d"]:
        """Return the summed gradients, times the rate."""
        gradients = task.gradients(None)
        return self.rate * gradients.sum_over(task.forget, progress=task.progress)


@dataclass(frozen=True)
class SecondOrder(WeightUpdate):
    """A Newton step: the influence function of all forgotten samples together.

    It uses the snapshots of the run if there are any, which is far more accurate.

    Attributes:
        solver: The solver of the damped linear system.
        damping: Added to the curvature's diagonal; by default the value that the run suggests.
        curvature: The curvature; other solvers than ``Woodbury()`` take ``Hessian()``, for a loss
            whose labels cannot be sampled.
    """

    solver: Solver = Woodbury()
    damping: float | None = None
    curvature: ModelCurvature = GaussNewton()

    def __post_init__(self) -> None:
        require_kind("solver", self.solver, Solver, "`Woodbury()`")
        require_kind("curvature", self.curvature, ModelCurvature, "`GaussNewton()`")
        if self.damping is not None:
            require_positive("damping", self.damping)

    def displacement(self, task: ForgettingTask) -> Float[Tensor, " d"]:
        """Return the inverse curvature times the summed gradients, over the number of samples."""
        has_snapshots = bool(task.run.snapshots())
        gradients = task.gradients(task.run) if has_snapshots else task.current_gradients()
        summed = gradients.sum_over(task.forget, progress=task.progress)
        method = FullInfluenceFunction(self.solver, self.curvature, self.damping)
        suggested = None if self.damping is not None else suggested_full_damping(task.run)
        with preserved_state(task.model, "eval"):
            objective = gradients.objective(task.retain, suggested, progress=task.progress)
            solution = method.solve(objective, summed[None], progress=task.progress)
        return gradients.as_parameters(solution.directions[0]) / objective.n


@dataclass(frozen=True)
class UnrolledUpdate(WeightUpdate):
    """The effect of the missing rows, carried forward through the recorded training.

    It reads the run only. The run must hold uncompressed rows:
    ``GradientRecorder(projector=Identity())``.

    Attributes:
        curvature: How to build the curvature of each step.
        propagator: How much of a displacement a step leaves.
    """

    curvature: Curvature = BestAvailable()
    propagator: Propagator = Exponential()

    def __post_init__(self) -> None:
        require_kind("curvature", self.curvature, Curvature, "`BestAvailable()`")
        require_kind("propagator", self.propagator, Propagator, "`Exponential()` or `Linear()`")

    def displacement(self, task: ForgettingTask) -> Float[Tensor, " d"]:
        """Return the displacement after the last step.

        Raises:
            ValueError: If the run is not a training with uncompressed rows.
        """
        require_uncompressed(task.run)
        require_training(task.run)
        warn_of_approximations(task.run)
        width = task.run.recipe.dimension
        state = _Displacement(torch.zeros(width, dtype=task.run.recipe.torch_dtype))
        for step in task.run:
            rows, scales = self.curvature.scaled_rows(step)
            dynamics = Dynamics.of(step)
            hessian = LimitedCurvature(rows, scales, dynamics.effective_lr, self.propagator)
            missing = step.sketch[torch.isin(step.sample_ids, task.forget_ids)].sum(dim=0)
            for _ in range(task.run.recipe.every_n_steps):
                state.step_(dynamics, missing, _products(hessian, rows))
        gradients = task.current_gradients()
        return gradients.as_parameters(gradients.vectors(state.weights[None], None)[0])


def require_uncompressed(run: Store) -> None:
    """Check that the rows of a run are whole gradients."""
    if run.recipe.projector["name"] != "Identity":
        raise ValueError(
            f"The rows of the run were sketched by a `{run.recipe.projector['name']}`, which "
            "cannot be turned back into weights; expected `Identity`. Record with "
            "`GradientRecorder(..., projector=Identity())`, or use `SecondOrder()`."
        )


class _Displacement:
    """Displacements of the weights and of the momentum buffers, step by step."""

    def __init__(self, weights: Float[Tensor, " k"]) -> None:
        self.weights = weights
        self._buffers: dict[float, Tensor] = {}  # by the owner of the momentum buffer

    def step_(
        self,
        dynamics: Dynamics,
        missing: Float[Tensor, " k"],
        curvature: Callable[[Float[Tensor, " k"]], Float[Tensor, " k"]],
    ) -> None:
        """Take one step of the optimizer with the displacement of its gradient."""
        gradient = curvature(self.weights) + dynamics.coupled_decay * self.weights - missing
        buffer = self._buffers.get(dynamics.owner, torch.zeros_like(gradient))
        buffer = dynamics.momentum * buffer + dynamics.gradient_share * gradient
        self._buffers[dynamics.owner] = buffer
        update = dynamics.buffer_coefficient * buffer + dynamics.nesterov * gradient
        decay_factor = 1 - dynamics.lr * dynamics.decoupled_decay
        self.weights = decay_factor * self.weights - dynamics.lr * update


def _products(
    hessian: LimitedCurvature, rows: Float[Tensor, "m k"]
) -> Callable[[Float[Tensor, " k"]], Float[Tensor, " k"]]:
    def product(vector: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        negative = torch.zeros_like(vector)[:, None]
        hessian.subtract_product_(negative, (rows @ vector)[:, None])
        return -negative[:, 0]

    return product
