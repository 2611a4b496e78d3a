"""Recipe: how the sketches of a run were made, as plain data that fits into JSON.

Queries are recorded with the recipe of their run. :meth:`Recipe.require_blocks` checks that a model
has the layers of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.arguments import is_selected, unmatched
from tda_lightning.stores.recipe_checks import block_differences, shorten

SampleAxis = int | Literal["flattened"]


@dataclass(frozen=True)
class Block:
    """A layer's recorded parameters, laid out as one matrix.

    A weight is flattened to ``(rows, columns)``; its bias is one more column. Layers that have only
    vectors, such as a norm's scale and shift, are stacked into a single column.

    Attributes:
        name: Name of the module in ``named_modules``, followed by the parameter's name if the
            module's parameters are in several blocks.
        layer: Class name of the module.
        modules: Names of the modules that feed the block: several if they share a parameter.
        parameters: Full names of the parameters, in their order in the matrix.
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
    """Trainable parameters that are not recorded, their module, and the reason."""

    name: str
    layer: str
    size: int
    reason: str

    def describe(self) -> str:
        """Return one sentence that names the layer, its size and the reason."""
        return f"not recorded: {self.layer} `{self.name}` ({self.size:,} parameters): {self.reason}"


@dataclass(frozen=True, repr=False)
class Recipe:
    """How the sketches of a run were made.

    Attributes:
        blocks: Recorded layers, in the order of the sketch.
        left_out: Trainable parameters that are not recorded.
        projector: Class name and arguments of the projector.
        dimension: Length ``k`` of a sketch row.
        dtype: Number format of the rows.
        reduction: How the training loss combines samples; visits weigh 1/n under ``"mean"``.
        batch_dims: Sample axis by layer-name pattern, where it is not 0. ``"flattened"`` means that
            it is merged with other axes, samples first.
        preconditioner: ``"optimizer"`` if rows are in the coordinates of an Adam-like optimizer.
            The steps at which its factors change hold them.
        curvature: ``"fisher"`` if steps hold rows of sampled labels.
        ranks: Number of recording processes; each records its part of every step.
        every_n_steps: Stride; one recorded step represents this many.
        is_training: Whether steps changed the weights; ``False`` for passes without training.
        train_ids: Half-open ranges of the ids in the training set, or ``None`` if unknown.
        widths: Number of columns of each block in a row, in order, or ``None`` if blocks share
            columns.
        normalized: Names of parameters in front of batch norms that used the statistics of the
            batch. In queries, the running statistics follow them.
        model: Class name of the model.
        versions: Versions of the recording software.
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
    normalized: tuple[str, ...] = ()

    @property
    def block_names(self) -> frozenset[str]:
        """Names of all blocks."""
        return frozenset(block.name for block in self.blocks)

    @property
    def recorded_blocks(self) -> tuple[Block, ...]:
        """The blocks without those that turned out not to be recordable, whose rows are zero."""
        names = {entry.name for entry in self.left_out}
        return tuple(block for block in self.blocks if block.name not in names)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Number format of the rows as a torch dtype."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def __repr__(self) -> str:
        shown = [f"{block.name} ({block.rows} x {block.columns})" for block in self.blocks[:5]]
        name, *arguments = (f"{key}={value}" for key, value in self.projector.items())
        known = self.train_ids is not None
        stride = "every step" if self.every_n_steps == 1 else f"one step in {self.every_n_steps:,}"
        lines = {
            "layers": f"{len(self.blocks)}: {', '.join(shown)}{', ...' * (len(self.blocks) > 5)}",
            "left out": f"{len(self.left_out)}",
            "rows": f"{self.dimension:,} columns, {self.dtype}",
            "projector": f"{name.removeprefix('name=')}({', '.join(arguments)})",
            "coordinates": "optimizer" if self.preconditioner == "optimizer" else "gradients",
            "sampled labels": "yes" if self.curvature == "fisher" else "no",
            "loss": f"{self.reduction} over samples",
            "recorded": stride if self.is_training else "passes",
            "processes": f"{self.ranks:,}",
            "training samples": f"{count_of(self.train_ids or ()):,}" if known else "unknown",
        }
        body = "\n".join(f"  {label:<18}{value}" for label, value in lines.items())
        return f"Recipe of a `{self.model}`\n{body}"

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested builtins, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from the result of :meth:`to_dict`; lists may replace tuples."""
        fields = {name: _tuples(value) for name, value in data.items()}
        fields["blocks"] = tuple(
            Block(**{name: _tuples(value) for name, value in block.items()})
            for block in data["blocks"]
        )
        fields["left_out"] = tuple(LeftOut(**entry) for entry in data["left_out"])
        return cls(**fields)

    def require_rows(self) -> None:
        """Check that the run holds rows: those of ``LossRecorder`` have none."""
        if self.projector.get("name") == "none":
            raise ValueError(
                "The run holds losses and no rows; expected rows of gradients. Record with "
                "`GradientRecorder` instead of `LossRecorder`."
            )

    def columns_of(self, layers: Sequence[str]) -> Int[Tensor, " m"]:
        """Return the columns of a row that belong to the given layers.

        Args:
            layers: Names of blocks or of their modules; ``*`` is any characters, ``!`` excludes.

        Raises:
            ValueError: If a name matches no layer, or layers share columns.
        """
        selected = self.selects(layers)
        if self.widths is None:
            name, *arguments = (f"{key}={value}" for key, value in self.projector.items())
            raise ValueError(
                f"The layers of this run cannot be separated: its `{name.removeprefix('name=')}` "
                f"({', '.join(arguments)}) adds all of them into the same columns. Record with "
                "`GradientRecorder(layers=[...])`, or with a projector that keeps them separate: "
                "`Kronecker()` or `Identity()`."
            )
        columns = torch.repeat_interleave(torch.tensor(selected), torch.tensor(self.widths))
        return columns.nonzero()[:, 0]

    def selects(self, layers: Sequence[str]) -> list[bool]:
        """Return for each block whether it is among layers; an unknown one raises an error."""
        if isinstance(layers, str) or not layers:
            raise ValueError(
                f"`layers` is {layers!r}; expected a non-empty list of layer names, such as "
                f"[{self.blocks[-1].name!r}]."
            )
        names = [(block.name, *block.modules) for block in self.blocks]
        for pattern in unmatched([name for group in names for name in group], layers):
            raise ValueError(
                f"`layers` contains `{pattern}`, which matches no layer of the run; expected names "
                f"from {[block.name for block in self.blocks]}. Correct the name, or use `*`."
            )
        return [is_selected(group, layers) for group in names]

    def require_continued_by(self, other: Recipe) -> None:
        """Check that ``other`` makes the same sketches; software versions may differ.

        Raises:
            ValueError: If another setting differs; the message names it.
        """
        ours, theirs = self.to_dict(), other.to_dict()
        # Widths follow from the projector and the blocks; norms are found in the first step.
        compared = [name for name in ours if name not in ("versions", "widths", "normalized")]
        changed = [name for name in compared if ours[name] != theirs[name]]
        if changed:
            shown = "; ".join(
                f"`{name}` was {shorten(ours[name])} and is now {shorten(theirs[name])}"
                for name in changed
            )
            raise ValueError(
                f"This training cannot continue the recorded run: {shown}. Expected the original "
                "settings of the run. Restore them, or record into another store."
            )

    def require_alike(self, other: Recipe, argument: str) -> None:
        """Check that the rows of another recording, an argument, are comparable to the run's."""
        for name in ("projector", "blocks", "dimension", "preconditioner"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"`{argument}` was not sketched like the run: its {name} is "
                    f"{shorten(theirs)}, the run's is {shorten(ours)}. Expected equal settings; "
                    "record with `record(model, loader, like=run)`."
                )

    def require_blocks(self, blocks: Sequence[Block], model: str) -> None:
        """Check that the blocks of a model, named by its class, are the recorded ones."""
        self.require_rows()
        differences = block_differences(self.blocks, blocks)
        if differences:
            raise ValueError(
                f"`model` does not have the layers of the run, which recorded `{self.model}`: "
                f"{'; '.join(differences[:3])}{'; ...' if len(differences) > 3 else ''}. "
                f"Expected the trained model; got `{model}`. Pass a model of the same architecture "
                "with the same trainable parameters."
            )


def _tuples(value: Any) -> Any:
    """Return a value in which tuples replace lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


# Sample ids are half-open ranges: an id per sample would be long in a recipe.


def ranges_of(ids: Int[np.ndarray, " n"]) -> tuple[tuple[int, int], ...]:
    """Compress sorted, distinct ids into half-open ranges.

    >>> ranges_of(np.array([0, 1, 2, 7]))
    ((0, 3), (7, 8))
    """
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 2) != 1)
    stops = np.append(starts[1:], len(ids))
    return tuple((int(ids[a]), int(ids[b - 1]) + 1) for a, b in zip(starts, stops, strict=True))


def count_of(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of ids in half-open ranges.

    >>> count_of([(0, 3), (7, 8)])
    4
    """
    return sum(b - a for a, b in ranges)


def ids_of(ranges: Iterable[tuple[int, int]]) -> Int[Tensor, " n"]:
    """Expand half-open ranges into ids.

    >>> ids_of([(0, 3), (7, 8)]).tolist()
    [0, 1, 2, 7]
    """
    parts = [torch.arange(a, b) for a, b in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
