"""Audits: compare the rows of a step with its gradient and with the update of the weights.

The rows of a step should sum to its gradient. They do, by construction, unless a weight is used in
a way that no hook sees: through a functional call, a shared parameter, a hook that rewrites
gradients. Comparing the two finds all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from tda_lightning.gradients.gradient_layouts import squared_norm
from tda_lightning.gradients.parameter_selection import COMPLEX_REASON, ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.stores.recipe import Block, LeftOut
from tda_lightning.stores.step import Audit


@dataclass(frozen=True)
class AuditStart:
    """Sketches of an audited step before the optimizer takes it, block by block.

    ``left_out`` is the squared gradient norm of the trained parameters that are not recorded.
    """

    recorded: Float[Tensor, "blocks k"]
    gradient: Float[Tensor, "blocks k"]
    weights: Float[Tensor, "blocks k"]
    left_out: float


def begin_audit(
    rows: RowRecorder, recorded: Float[Tensor, "blocks k"], trained: Sequence[Parameter]
) -> AuditStart:
    """Sketch the gradient and the weights of a step, beside the sums of its recorded rows."""
    left_out = rows.left_out_gradient(trained)
    return AuditStart(recorded, rows.sketch_gradient(), rows.sketch_weights(), left_out)


def finish_audit(rows: RowRecorder, start: AuditStart) -> Audit:
    """Return the audit of a step that the optimizer has just taken."""
    update = (rows.sketch_weights() - start.weights).sum(dim=0)
    cosine = torch.nn.functional.cosine_similarity(update, start.recorded.sum(dim=0), dim=0)
    return Audit(
        gradient=start.gradient.square().sum(dim=1).cpu().double(),
        deviation=(start.recorded - start.gradient).square().sum(dim=1).cpu().double(),
        left_out=start.left_out,
        update=float(cosine.square()),
    )


# The rounding of a gradient to bfloat16 makes up a tenth of it.
MAX_RELATIVE_DEVIATION = 0.02


def relative_deviations(
    recorded: Float[Tensor, "blocks k"],
    actual: Float[Tensor, "blocks k"],
    rounding: Float[Tensor, " blocks"],
    lost: Collection[int] = (),
) -> Float[Tensor, " blocks"]:
    """Return how far the rows of every block are from summing to its gradient, beyond rounding.

    ``rounding`` bounds the rounding error of each sum. Where samples cancel, as in a bias before a
    batch norm, it may be larger than the gradient. Blocks that are ``lost`` do not deviate.
    """
    norms = recorded.norm(dim=1).maximum(actual.norm(dim=1))
    deviations = ((recorded - actual).norm(dim=1) - rounding).clamp_min(0)
    # A gradient that nearly vanishes beside the others' is compared on the scale of the largest.
    relative = deviations / (norms + 1e-3 * norms.max()).clamp_min(1e-30)
    is_kept = torch.tensor([number not in lost for number in range(len(relative))])
    return torch.where(is_kept.to(relative.device), relative, 0)


class ConservationCheck:
    """Checks that the rows of every block sum to its gradient.

    Args:
        warn: Called with a warning of a step after the first; in the first, an error is raised.

    Attributes:
        is_accepted: Whether the first step warns too, since an earlier training was accepted.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._has_warned = self._has_warned_of_lost = self.is_accepted = False

    def __call__(
        self,
        blocks: Sequence[Block],
        start: AuditStart,
        rounding: Float[Tensor, " blocks"],
        lost: Collection[int] = (),
        step: int = 0,
    ) -> None:
        """Check a recorded step of a training, counted from 0.

        ``rounding`` and ``lost`` are as in :func:`relative_deviations`.

        Raises:
            ValueError: If a block deviates in the first step; names the one that deviates most.
        """
        relative = relative_deviations(start.recorded, start.gradient, rounding, lost)
        worst = int(relative.argmax())
        if self._has_warned or not relative[worst] > MAX_RELATIVE_DEVIATION:
            return
        is_cleared = not start.gradient[worst].any()
        when = f"recorded step {step:,}" if step else "the first step"
        message = (_cleared if is_cleared else _deviating)(
            blocks[worst], float(relative[worst]), when
        )
        if not step and not self.is_accepted:
            raise ValueError(message)
        self._has_warned = True
        self._warn(
            f"GradientRecorder: {message} The run goes on, since its earlier steps were accepted."
        )

    def check_lost(
        self,
        selection: ParameterSelection,
        lost: Collection[int],
        trained: Sequence[Parameter],
        step: int,
    ) -> None:
        """Warn once if much of a later step's gradient belongs to blocks that are not recorded."""
        total = squared_norm(trained)
        squares = {number: squared_norm(selection.parameters[number]) for number in sorted(lost)}
        share = sum(squares.values()) / total if total else 0.0
        if self._has_warned_of_lost or not step or not share > MAX_LOST_SHARE:  # Or NaN.
            return
        self._has_warned_of_lost = True
        largest = selection.blocks[max(squares, key=lambda number: squares[number])]
        self._warn(
            f"GradientRecorder: {share:.0%} of the squared gradient of recorded step {step:,} "
            "belongs to parameters whose rows cannot be separated, above all to "
            f"`{largest.name}`; expected at most {MAX_LOST_SHARE:.0%}, as in the first step. "
            "Scores do not contain what the samples did to them. See `A parameter is left out` in "
            "docs/gotchas.md."
        )


def _deviating(block: Block, deviation: float, when: str) -> str:
    return (
        f"The recorded rows of the {block.layer} `{block.name}` do not sum to its gradient: in "
        f"{when} the sum is {deviation:.0%} off. Expected that its gradient comes from the "
        "samples alone; a penalty on it, a gradient hook or the output of a custom function may "
        "change it, and so may gradients that were not zeroed. Replace a penalty by "
        "`weight_decay=` of the optimizer, or leave the layer out "
        f"with `layers=['!{block.name}']`."
    )


def _cleared(block: Block, deviation: float, when: str) -> str:
    return (
        f"The gradient of the {block.layer} `{block.name}` was cleared between the backward pass "
        f"and {when}, as for a layer that stays frozen in the first epochs. Expected the "
        "gradient of the backward pass. Freeze the layer by `requires_grad_(False)`, or leave it "
        f"out with `layers=['!{block.name}']`."
    )


# The largest share of a step's squared gradient that may be missing from its rows.
MAX_LOST_SHARE = 0.1


def lost_parameters(
    selection: ParameterSelection,
    reasons: Mapping[int, str],
    trained: Sequence[Parameter],
    max_share: float = MAX_LOST_SHARE,
) -> list[LeftOut]:
    """Describe the blocks that cannot be recorded, by their share of a step's squared gradient.

    Args:
        selection: All blocks, with their parameters.
        reasons: Why a block cannot be recorded, by its number.
        trained: All parameters that the step updates, with their gradients.
        max_share: The largest share of the squared gradient that may be missing.

    Raises:
        ValueError: If more of it would be missing.
    """
    total = squared_norm(trained)
    entries, sum_of_shares = [], 0.0
    for number, reason in sorted(reasons.items()):
        block = selection.blocks[number]
        share = squared_norm(selection.parameters[number]) / total if total else 0.0
        sum_of_shares += share
        detail = f"{reason}; it has {share:.2%} of the first step's squared gradient"
        entries.append(LeftOut(block.name, block.layer, block.size, detail))
    if sum_of_shares > max_share:
        listed = "; ".join(f"`{entry.name}`: {entry.reason}" for entry in entries[:3])
        raise ValueError(
            f"{sum_of_shares:.0%} of the first step's squared gradient cannot be recorded: "
            f"{listed}{'; ...' if len(entries) > 3 else ''}. Expected at most "
            f"{max_share:.0%}. Declare where the samples lie with `batch_dims={{...}}`, or "
            f"accept what is left with `layers={[f'!{entry.name}' for entry in entries]}`."
        )
    return entries


def check_complex(selection: ParameterSelection, trained: Sequence[Parameter]) -> None:
    """Check how much of a step's squared gradient belongs to complex parameters.

    Raises:
        ValueError: If it is too much to leave out.
    """
    names = [entry.name for entry in selection.left_out if entry.reason == COMPLEX_REASON]
    if not names:
        return
    total = squared_norm(trained)
    share = squared_norm(p for p in trained if p.is_complex()) / total if total else 0.0
    if share > MAX_LOST_SHARE:
        raise ValueError(
            f"{share:.0%} of the first step's squared gradient belongs to complex parameters of "
            f"{', '.join(f'`{name}`' for name in names)}, which cannot be recorded; expected at "
            f"most {MAX_LOST_SHARE:.0%}. Train a real parameter with an axis of length 2, and use "
            "`torch.view_as_complex(parameter)` in its place, or accept what is left with "
            f"`layers={[f'!{name}' for name in names]}`."
        )


def blocks_beyond(selection: ParameterSelection, trained: Sequence[Parameter]) -> set[int]:
    """Return the blocks with a parameter that is not among those of the optimizer now."""
    parts = enumerate(selection.parameters)
    return {number for number, part in parts if not set(trained).issuperset(part)}


def negligible_blocks(parameters: Sequence[Sequence[Parameter]]) -> set[int]:
    """Return the vectors whose gradient is below what rounding leaves of the whole one.

    A bias to which a softmax over positions is blind has such a gradient: its terms cancel. A
    gradient of exact zeros is compared with its rows: it may have been set to zero.
    """
    squares = [squared_norm(block) for block in parameters]
    bound = (64 * torch.finfo(torch.float32).eps) ** 2 * sum(squares)
    are_vectors = [all(p.ndim < 2 for p in block) for block in parameters]
    pairs = enumerate(zip(squares, are_vectors, strict=True))
    return {number for number, (square, is_vector) in pairs if is_vector and 0 < square < bound}
