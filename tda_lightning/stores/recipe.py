"""Recipe: how the sketches of a run were made, as plain data that fits into JSON.

Queries are recorded by the recipe of the run they ask; :meth:`Recipe.require_blocks` is the one
place that says whether a model can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

SampleAxis = int | Literal["flattened"]


@dataclass(frozen=True)
class Block:
    """A layer's recorded parameters, laid out as one matrix.

    A weight is flattened to ``(rows, columns)`` and its bias stands in one more column; layers with
    vectors only (a norm's scale and shift) are stacked into a single column.

    Attributes:
        name: Name of the module, as ``named_modules`` has it; with the parameter's name behind it
            if the module's parameters stand in several blocks.
        layer: Class name of the module.
        modules: Names of the modules that feed it: one, or several that share a parameter.
        parameters: Full names of the parameters, in the order in which the matrix holds them.
        rows: Rows of the matrix.
        columns: Columns of the matrix.
    """

    name: str
    layer: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of recorded parameters."""
        return self.rows * self.columns


@dataclass(frozen=True)
class LeftOut:
    """Trainable parameters that are not recorded, and why.

    Attributes:
        name: Name of the module that owns them.
        layer: Class name of that module.
        size: Number of parameters.
        reason: Why they are not recorded.
    """

    name: str
    layer: str
    size: int
    reason: str

    def describe(self) -> str:
        """Return one sentence that names the layer, its size and the reason."""
        return f"not recorded: {self.layer} `{self.name}` ({self.size:,} parameters): {self.reason}"


@dataclass(frozen=True)
class Recipe:
    """How the sketches of a run were made.

    Attributes:
        blocks: Recorded layers, in the order of the sketch.
        left_out: Trainable parameters that are not recorded.
        projector: Class name and arguments of the projector.
        dimension: Length ``k`` of a sketch row.
        dtype: Number format of the rows.
        reduction: How the training loss combines samples; visits weigh 1/n under ``"mean"``.
        batch_dims: Axis of the samples in layers whose names match a pattern, where not 0, or
            ``"flattened"`` where that axis is joined with others, samples first.
        preconditioner: Whose coordinates the rows are in: the optimizer's, or nobody's. The factors
            stand in the steps at which they change.
        curvature: Whether steps hold rows of sampled labels.
        ranks: Number of processes that record, each its part of every step.
        every_n_steps: Stride; one recorded step stands for this many.
        is_training: Whether steps moved the weights; ``False`` for passes that were recorded anew.
        train_ids: Half-open ranges of the ids in the training set, or ``None`` if it is not known.
        widths: Number of a row's columns that belong to each block, in order, or ``None`` where
            blocks share columns.
        model: Class name of the model.
        versions: Versions of the software that recorded.
    """

    blocks: tuple[Block, ...]
    left_out: tuple[LeftOut, ...]
    projector: Mapping[str, str | int]
    dimension: int
    dtype: Literal["float32", "float64"] = "float32"
    reduction: Literal["mean", "sum"] = "mean"
    batch_dims: Mapping[str, SampleAxis] = field(default_factory=dict)
    preconditioner: Literal["optimizer", "none"] = "none"
    curvature: Literal["fisher", "none"] = "none"
    ranks: int = 1
    every_n_steps: int = 1
    train_ids: tuple[tuple[int, int], ...] | None = None
    model: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    widths: tuple[int, ...] | None = None
    is_training: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        """Number format of the rows as torch knows it."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested builtins, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from :meth:`to_dict`'s result (lists may stand for tuples)."""
        ranges, widths = data["train_ids"], data.get("widths")
        return cls(
            **{
                **data,
                "blocks": tuple(
                    Block(
                        **{
                            **block,
                            "modules": tuple(block["modules"]),
                            "parameters": tuple(block["parameters"]),
                        }
                    )
                    for block in data["blocks"]
                ),
                "left_out": tuple(LeftOut(**entry) for entry in data["left_out"]),
                "train_ids": None if ranges is None else tuple((a, b) for a, b in ranges),
                "widths": None if widths is None else tuple(widths),
            }
        )

    def columns_of(self, layers: Sequence[str]) -> Int[Tensor, " m"]:
        """Return which columns of a row belong to some layers.

        Args:
            layers: Names of blocks, or of the modules that feed them, with ``*`` for any
                characters.

        Raises:
            ValueError: If a name matches none, or the layers share columns.
        """
        if isinstance(layers, str) or not layers:
            raise ValueError(
                f"`layers` is {layers!r}; expected a list of names, of one layer at least, such as "
                f"[{self.blocks[-1].name!r}]."
            )
        if self.widths is None:
            name, *arguments = (f"{key}={value}" for key, value in self.projector.items())
            raise ValueError(
                f"The layers of this run cannot be told apart: its `{name.removeprefix('name=')}` "
                f"({', '.join(arguments)}) adds all of them into the same columns. Record with "
                "`GradientRecorder(layers=[...])`, or with a projector that keeps them apart: "
                "`Kronecker()` or `Identity()`."
            )
        for pattern in layers:
            if not any(_matches(block, pattern) for block in self.blocks):
                raise ValueError(
                    f"`layers` names `{pattern}`, which is no layer of the run; expected names out "
                    f"of {[block.name for block in self.blocks]}. Correct the name, or use `*`."
                )
        chosen = [any(_matches(block, one) for one in layers) for block in self.blocks]
        whole = torch.repeat_interleave(torch.tensor(chosen), torch.tensor(self.widths))
        return whole.nonzero()[:, 0]

    def require_continued_by(self, other: Recipe) -> None:
        """Raise unless another recipe makes the same sketches, whatever software it names.

        Raises:
            ValueError: Naming what differs.
        """
        ours, theirs = self.to_dict(), other.to_dict()
        # Widths follow from the projector and the blocks.
        told = [name for name in ours if name not in ("versions", "widths")]
        changed = [name for name in told if ours[name] != theirs[name]]
        if changed:
            shown = "; ".join(
                f"`{name}` was {_shorten(ours[name])} and is now {_shorten(theirs[name])}"
                for name in changed
            )
            raise ValueError(
                f"This training cannot continue the recorded run: {shown}. Expected the settings "
                "that the run was begun with. Restore them, or record into another store."
            )

    def require_alike(self, other: Recipe, argument: str) -> None:
        """Raise unless the rows of another recording can stand for this one's.

        Args:
            other: The recipe of the other.
            argument: What the other is called where the user has passed it.

        Raises:
            ValueError: Naming what differs.
        """
        for name in ("projector", "blocks", "dimension", "preconditioner"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"`{argument}` was not sketched as the run was: its {name} is "
                    f"{_shorten(theirs)}, the run's is {_shorten(ours)}. Expected rows of the same "
                    "kind; record them with `record(model, loader, like=run)`."
                )

    def require_blocks(self, blocks: Sequence[Block], model: str) -> None:
        """Raise unless ``blocks``, read off ``model``, are the recorded ones.

        Raises:
            ValueError: If a block is missing, new, or of another shape.
        """
        differences = _differences(self.blocks, blocks)
        if differences:
            raise ValueError(
                f"`model` does not have the layers of the run, which recorded `{self.model}`: "
                f"{'; '.join(differences[:3])}{'; ...' if len(differences) > 3 else ''}. "
                f"Expected the model that was trained; got `{model}`. Pass the same architecture "
                "(with the same parameters trainable)."
            )


def _matches(block: Block, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (block.name, *block.modules))


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _differences(expected: Sequence[Block], found: Sequence[Block]) -> list[str]:
    ours = {block.name: block for block in expected}
    theirs = {block.name: block for block in found}
    missing = [f"`{name}` is missing" for name in ours if name not in theirs]
    added = [f"`{name}` is new" for name in theirs if name not in ours]
    changed = [
        f"`{name}` was recorded as {_shape(ours[name])} and is now {_shape(theirs[name])}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    return missing + added + changed


def _shape(block: Block) -> str:
    return f"{block.layer} of {block.rows} x {block.columns}"


def ranges_of(ids: Int[np.ndarray, " n"]) -> tuple[tuple[int, int], ...]:
    """Compress sorted, distinct ids into half-open ranges.

    >>> ranges_of(np.array([0, 1, 2, 7]))
    ((0, 3), (7, 8))
    """
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 2) != 1)
    stops = np.append(starts[1:], len(ids))
    return tuple((int(ids[a]), int(ids[b - 1]) + 1) for a, b in zip(starts, stops, strict=True))


def ids_of(ranges: Iterable[tuple[int, int]]) -> Int[Tensor, " n"]:
    """Expand half-open ranges into ids.

    >>> ids_of([(0, 3), (7, 8)]).tolist()
    [0, 1, 2, 7]
    """
    parts = [torch.arange(a, b) for a, b in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
