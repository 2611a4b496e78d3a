"""A recorded run as an explainer of quanda, for its metrics and benchmarks.

Import this file only where quanda is installed: ``pip install 'tda_lightning[quanda]'``. Quanda:
Bareeva et al. (2024), "Quanda: An Interpretability Toolkit for Training Data Attribution Evaluation
and Beyond".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tda_lightning.attribution import Attributor, Averaged, SelfAttributor, TracIn
from tda_lightning.attribution.attribute import attribute, self_influence
from tda_lightning.passes.targets import Loss, Target
from tda_lightning.recording.sample_ids import root_ids
from tda_lightning.results.optional import needs
from tda_lightning.stores.opening import Run, open_run

with needs("quanda"):
    from quanda.explainers import Explainer
    from quanda.utils.training.base_pl_module import BasicLightningModule

# `SelfInfluenceRanking` of quanda adds this times the index to each value.
_ADDED_PER_INDEX = 1e-4


class RecordedRun(Explainer):  # type: ignore[misc]  # quanda ships no types
    """Explanations from a recorded run.

    Quanda creates explainers itself: pass the class, and the run among ``expl_kwargs``.

    Args:
        model: The trained model: the recorded LightningModule, or the network that quanda's
            ``Trainer`` trained.
        train_dataset: The dataset that the run was trained on. Columns of explanations are in its
            order.
        run: The recorded training: its folder or a store.
        task: The task, as quanda names it.
        method: The attribution method of :meth:`explain`.
        self_method: The attribution method of :meth:`self_influence`.
        target: What to explain, see :func:`~tda_lightning.attribute`. Use ``Margin()`` for quanda's
            linear datamodeling score, which measures margins.
        criterion: The loss that quanda's ``Trainer`` was created with. It is not used for a
            LightningModule.
        train_ids: The recorded id of each sample of ``train_dataset``. By default its index, below
            any ``Subset``.
        checkpoints: Accepted for quanda, and not loaded: the weights are those of ``model``.
        checkpoints_load_func: See ``checkpoints``.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run was not trained on a sample of the dataset.
    """

    accepted_tasks = ["image_classification", "text_classification", "causal_lm"]  # noqa: RUF012

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        run: Run,
        *,
        task: str = "image_classification",
        method: Attributor = Averaged(),
        self_method: SelfAttributor = TracIn(),
        target: Target = Loss(),
        criterion: nn.Module | None = None,
        train_ids: Sequence[int] | None = None,
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            task=task,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
        )
        self._run = open_run(run)
        self._module = _as_trained(model, criterion or nn.CrossEntropyLoss())
        self._method, self._self_method, self._target = method, self_method, target
        ids = root_ids(train_dataset) if train_ids is None else train_ids
        self._columns = _positions(self._run.train_ids(), torch.as_tensor(ids))

    def explain(
        self, test_data: Any, targets: Sequence[int] | Tensor
    ) -> Float[Tensor, "n_test n_train"]:
        """Return the scores of all training samples, positive for proponents.

        Args:
            test_data: Inputs of the test samples: a tensor, or a mapping of tensors.
            targets: Their labels.
        """
        labels = torch.as_tensor(targets).to(self.device)
        is_mapping = isinstance(test_data, Mapping)
        batch = {**test_data, "labels": labels} if is_mapping else [test_data, labels]
        scores = attribute(
            self._run,
            self._module,
            batch,
            method=self._method,
            target=self._target,
            at="model",  # Quanda also passes models with random weights.
            progress=False,
        )
        return scores.values[:, self._columns].to(self.device)

    def self_influence(self, batch_size: int = 32) -> Float[Tensor, " n_train"]:
        """Return ranks of the self-influence, highest for the most influential sample.

        Quanda adds small numbers to these values before it sorts them. Ranks in double precision,
        with gaps, keep their order.

        Args:
            batch_size: Accepted for quanda, and not used: the run holds the gradients.
        """
        scores = self_influence(self._run, method=self._self_method, progress=False)
        return spaced_ranks(scores.values[self._columns]).to(self.device)


def spaced_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the rank of each value, in double precision, too far apart for quanda to reorder."""
    gap = max(1.0, 2 * _ADDED_PER_INDEX * len(values))
    return gap * values.argsort(stable=True).argsort().double()


def _as_trained(model: nn.Module, criterion: nn.Module) -> nn.Module:
    """Return the LightningModule that was trained: the model, or quanda's wrapper of it."""
    if hasattr(model, "training_step"):
        return model
    wrapper: nn.Module = BasicLightningModule(model, torch.optim.SGD, 0.0, criterion)
    return wrapper


def _positions(run_ids: Int[Tensor, " n_all"], ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the column of each sample in the scores of the run."""
    unknown = ids[~torch.isin(ids, run_ids)]
    if len(unknown):
        raise ValueError(
            f"Sample {int(unknown[0])} of `train_dataset` is not in the training set of the run; "
            f"expected some of its {len(run_ids):,} ids. Pass the dataset of the training, or the "
            "id of each sample as `train_ids=`."
        )
    return torch.searchsorted(run_ids, ids)
