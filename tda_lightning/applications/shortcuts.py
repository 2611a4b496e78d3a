r"""Find shortcuts: which attribute of the training samples drives the predictions on a slice?

A score is how far each training sample pushed the slice towards its predictions. The effect of an
attribute is the mean score of the samples that have it, minus the mean score of the others. It is
computed within each class, so that the class itself is no shortcut. Its p-value comes from random
permutations of the attribute within the classes (Fisher 1935; Good 2005, "Permutation, Parametric,
and Bootstrap Tests of Hypotheses"), times the number of attributes (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

from tda_lightning.applications.groups import Groups, number_groups
from tda_lightning.applications.predictions import of_classes
from tda_lightning.attribution import Attributor, GradientSimilarity
from tda_lightning.attribution.attribute import attribute
from tda_lightning.metrics.checks import require_mask
from tda_lightning.passes.batches import transfer
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.passes.outputs import Outputs, labels_of, outputs_of
from tda_lightning.passes.query_batches import identified
from tda_lightning.passes.targets import Target
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.stores.arguments import require_kind, require_whole
from tda_lightning.stores.opening import Run, open_run

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Effect:
    """How an attribute of training samples acts on the predictions of a slice.

    Attributes:
        attribute: Name of the attribute.
        effect: Mean score of samples with it minus that of samples without, in standard deviations
            of its permutations. Positive if they push towards the predictions.
        p_value: Probability of an effect at least as large by chance, for all attributes together.
        n_samples: Number of training samples with the attribute.
    """

    attribute: str
    effect: float
    p_value: float
    n_samples: int


@dataclass(frozen=True)
class Shortcut(ShownInNotebooks):
    """What drives the predictions on a slice.

    Attributes:
        effects: The attributes, strongest first.
        scores: How far each training sample pushed the slice towards its predictions.
        n_slice: Number of samples in the slice.
        n_permutations: Number of permutations behind each p-value.
    """

    effects: tuple[Effect, ...]
    scores: SampleScores
    n_slice: int
    n_permutations: int

    @property
    def ids(self) -> Int64[Tensor, " n_train"]:
        """Ids of the training samples, from those that push most towards the predictions."""
        return self.scores.train_ids[self.scores.values.argsort(descending=True)]

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per attribute."""
        pd = import_pandas()
        rows = [vars(effect) for effect in self.effects]
        columns = ["attribute", "effect", "p_value", "n_samples"]
        return pd.DataFrame(rows, columns=columns).set_index("attribute")

    def __repr__(self) -> str:
        samples = ", ".join(map(str, self.ids[:5].tolist()))
        lines = [
            f"  {effect.attribute}: effect {effect.effect:+.1f}, p = {effect.p_value:.3g} "
            f"({effect.n_samples:,} samples)"
            for effect in self.effects
        ]
        least = f"p-values are at least {1 / (1 + self.n_permutations):.2g}"
        head = f"Shortcut: what drives {self.n_slice:,} predictions ({least})"
        notes = ["Attributes that were not passed cannot be found; only their samples can."]
        if sum(effect.p_value < SIGNIFICANT for effect in self.effects) > 1:
            notes.insert(0, "Attributes that occur together share an effect: trust the strongest.")
        notes = [f"  {note}" for note in notes]
        return "\n".join([head, *lines, f"  main samples: {samples}", *notes])


def find_shortcut(
    run: Run,
    model: nn.Module,
    slice_: Any,
    attributes: Mapping[str, Bool[Tensor, " n_train"]],
    *,
    classes: Groups | None = None,
    reference: Any = None,
    method: Attributor = GradientSimilarity(),
    target: Target | None = None,
    outputs: Outputs = outputs_of,
    n_permutations: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Shortcut:
    """Test which attributes of the training samples drive the predictions on a slice of data.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule.
        slice_: The data whose predictions are in doubt: a batch or a ``DataLoader``.
        attributes: Which training samples have each attribute, by its name, in the order of
            ``run.train_ids()``.
        classes: Class of each training sample, a number or a name, in the same order. Attributes
            are compared within classes.
        reference: Data to compare with, such as the same slice without a watermark. Its mean score
            is subtracted, which removes what both have in common. Without it, the class and the
            content of the slice outweigh a weak shortcut.
        method: The attribution method.
        target: The quantity to explain; by default the logit of the predicted class. With a
            reference, it is the mean logit of the classes that are predicted on the slice, in
            proportion: the reference may be predicted as something else.
        outputs: Function of (module, batch) that returns the logits, for the default target.
        n_permutations: Number of random permutations.
        seed: Seed of the permutations.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument does not match the run.
    """
    store = open_run(run)
    require_whole("n_permutations", n_permutations, least=19)
    n_train = len(store.train_ids())
    require_kind("attributes", attributes, Mapping, '`{"watermark": mask}`')
    for name, members in attributes.items():
        require_mask(f"attributes[{name!r}]", members, (n_train,))
    strata = torch.zeros(n_train, dtype=torch.int64)
    if classes is not None:
        _, strata = number_groups(classes, n_train, "classes")
    outputs, _ = of_classes(store, outputs, labels_of)
    if target is None and reference is None:
        target = _PredictedLogit(outputs)
    elif target is None:
        target = _LogitOfClasses(outputs, _predicted_shares(model, slice_, outputs))

    def mean_scores(queries: Any) -> tuple[Float64[Tensor, " n_train"], int, str]:
        scores = attribute(store, model, queries, method=method, target=target, progress=progress)
        return scores.values.double().mean(dim=0), len(scores.values), scores.method

    values, n_slice, name = mean_scores(slice_)
    if reference is not None:
        values = values - mean_scores(reference)[0]
    chance = torch.Generator().manual_seed(seed)
    effects = [
        _test(label, members, values, strata, n_permutations, len(attributes), chance)
        for label, members in attributes.items()
    ]
    effects.sort(key=lambda effect: -effect.effect)
    scores = SampleScores(values, store.train_ids(), name)
    return Shortcut(tuple(effects), scores, n_slice, n_permutations)


@dataclass(frozen=True)
class _PredictedLogit:
    """The logit of each sample's predicted class."""

    outputs: Outputs

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, " n"]:
        highest: Tensor = self.outputs(module, batch).max(dim=-1).values
        return highest


@dataclass(frozen=True)
class _LogitOfClasses:
    """The mean logit of some classes, which is the logit of the class if there is only one."""

    outputs: Outputs
    shares: Float[Tensor, " classes"]

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, " n"]:
        logits = self.outputs(module, batch)
        return logits @ self.shares.to(logits)


def _predicted_shares(model: nn.Module, slice_: Any, outputs: Outputs) -> Float[Tensor, " classes"]:
    """Return the share of each class among the predictions on a slice."""
    with preserved_state(model, "eval"), torch.no_grad():
        logits = [outputs(model, transfer(model, batch)) for _, batch in identified(slice_)]
    is_predicted = [nn.functional.one_hot(part.argmax(-1), part.shape[-1]) for part in logits]
    return torch.cat(is_predicted).cpu().double().mean(dim=0)


def _test(
    name: str,
    members: Bool[Tensor, " n_train"],
    values: Float64[Tensor, " n_train"],
    strata: Int[Tensor, " n_train"],
    n_permutations: int,
    n_attributes: int,
    chance: torch.Generator,
) -> Effect:
    """Compare the sum of the members' scores, within strata, with that of random members."""
    observed, permuted = 0.0, torch.zeros(n_permutations, dtype=torch.float64)
    for stratum in torch.unique(strata):
        part, inside = values[strata == stratum], members[strata == stratum]
        n_members = int(inside.sum())
        if n_members in (0, len(part)):
            continue
        centred = part - part.mean()
        observed += float(centred[inside].sum())
        order = torch.rand(n_permutations, len(part), generator=chance).argsort(dim=1)
        permuted += centred[order[:, :n_members]].sum(dim=1)
    exceeding = int((permuted >= observed).sum())
    p_value = min((1 + exceeding) / (1 + n_permutations) * n_attributes, 1.0)
    spread = float(permuted.std())
    return Effect(name, observed / spread if spread else 0.0, p_value, int(members.sum()))
