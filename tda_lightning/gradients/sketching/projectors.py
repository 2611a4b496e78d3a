r"""Projectors: random linear maps from gradients to sketches of dimension ``k``.

Inner products survive them on average: :math:`E \langle Pa, Pb \rangle = \langle a, b \rangle`.
A projector is a frozen set of arguments; bound to the blocks of a model it becomes a
:class:`Sketcher`. Every map has two parts: each layer's matrix is shrunk on both sides (Kronecker)
or taken whole, and the results of all layers are laid side by side or hashed into ``k`` columns
(the count sketch of Charikar, Chen & Farach-Colton 2002).

All randomness is raw Philox bits, keyed by the seed and the layer's name: the same on every
machine, on every device, in every version.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from tda_lightning.arguments import require_whole
from tda_lightning.gradients.sketching.random_bits import buckets, sign_matrix, signs
from tda_lightning.gradients.sketching.sketcher import (
    BlockMap,
    ColumnMap,
    Hashed,
    Multiplied,
    SideBySide,
    Sketcher,
)
from tda_lightning.stores.recipe import Block

# A model of so many parameters is taken whole: hashing a sample's gradient then takes 20 us at
# most.
_SMALL_MODEL = 2**16
# Beyond this many hashed entries for each column of a row, a wider layer adds next to nothing.
_ENTRIES_PER_COLUMN = 4


@dataclass(frozen=True)
class Projector(ABC):
    """How gradients become sketch rows; plain whole numbers as arguments, no state."""

    def __post_init__(self) -> None:
        """Raise unless lengths are at least 1, and seeds at least 0."""
        for name, value in asdict(self).items():
            if not (name == "width" and value is None):
                require_whole(name, value, least=0 if name == "seed" else 1)

    def bind(self, blocks: Sequence[Block], device: torch.device, dtype: torch.dtype) -> Sketcher:
        """Return the linear map for these blocks, ready to be applied on ``device``."""
        chosen = self.chosen_for(blocks)
        maps = [chosen._block_map(block).to(device, dtype) for block in blocks]
        names = [block.name for block in blocks]
        columns = chosen._column_map(names, [map_.size for map_ in maps])
        return Sketcher(maps, columns.to(device, dtype), device, dtype)

    def chosen_for(self, blocks: Sequence[Block]) -> Projector:
        """Return the projector with every argument that was left open filled in for the blocks."""
        return self

    def to_dict(self) -> dict[str, str | int]:
        """Return the class name and the arguments but those left open, for a recipe."""
        given = {name: int(value) for name, value in asdict(self).items() if value is not None}
        return {"name": type(self).__name__, **given}

    @abstractmethod
    def _block_map(self, block: Block) -> BlockMap: ...

    @abstractmethod
    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap: ...


@dataclass(frozen=True)
class Identity(Projector):
    """No projection: rows are whole gradients. Exact, and as wide as the model."""

    def _block_map(self, block: Block) -> BlockMap:
        return BlockMap(block.rows, block.columns)

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return SideBySide(sizes)


@dataclass(frozen=True)
class Kronecker(Projector):
    """Shrink each layer's matrix to at most ``width**2`` numbers and lay the layers side by side.

    Attributes:
        width: Side of a shrunk layer.
        seed: Seed of the random signs.
    """

    width: int = 32
    seed: int = 0

    def _block_map(self, block: Block) -> BlockMap:
        return _shrink(block, self.width, self.seed)

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return SideBySide(sizes)


@dataclass(frozen=True)
class CountSketch(Projector):
    """Hash every parameter into one of ``dimension`` columns. Exact factors, long hash tables.

    Attributes:
        dimension: Length of a sketch row; less if the model has fewer parameters.
        seed: Seed of hashes and signs.
    """

    dimension: int = 2048
    seed: int = 0

    def _block_map(self, block: Block) -> BlockMap:
        return BlockMap(block.rows, block.columns)

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return _hash_or_lay_out(names, sizes, self.dimension, self.seed)


@dataclass(frozen=True)
class DenseProjection(Projector):
    """Multiply whole gradients with a dense matrix of random signs: the slow reference.

    The matrix holds ``dimension`` times as many numbers as the model; for small models and for
    judging the other projectors only.

    Attributes:
        dimension: Length of a sketch row.
        seed: Seed of the signs.
    """

    dimension: int = 2048
    seed: int = 0

    def _block_map(self, block: Block) -> BlockMap:
        return BlockMap(block.rows, block.columns)

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return Multiplied(
            [
                sign_matrix(size, self.dimension, self.seed, f"{name}/dense")
                for name, size in zip(names, sizes, strict=True)
            ]
        )


@dataclass(frozen=True)
class KroneckerCountSketch(Projector):
    """Shrink each layer's matrix, then hash all layers into one row: the default.

    Attributes:
        dimension: Length of a sketch row; less if the shrunk layers need fewer.
        width: Side of a shrunk layer. By default wide enough to take small models whole (shrinking
            costs more accuracy than hashing does), else 32, or less for models of many layers,
            whose shrunk matrices fill the row several times over anyway.
        seed: Seed of signs and hashes.
    """

    dimension: int = 2048
    width: int | None = None
    seed: int = 0

    def chosen_for(self, blocks: Sequence[Block]) -> Projector:
        """Choose the width, if it was left open: as wide as is of use, since width is time."""
        if self.width is not None:
            return self
        if sum(block.size for block in blocks) <= _SMALL_MODEL:
            return replace(self, width=math.isqrt(max(block.size for block in blocks)) + 1)
        matrices = sum(block.columns > 1 for block in blocks)
        fitting = [w for w in (32, 16) if matrices * w**2 <= _ENTRIES_PER_COLUMN * self.dimension]
        return replace(self, width=fitting[0] if fitting else 8)

    def _block_map(self, block: Block) -> BlockMap:
        assert self.width is not None
        return _shrink(block, self.width, self.seed)

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return _hash_or_lay_out(names, sizes, self.dimension, self.seed)


_PROJECTORS = (Identity, Kronecker, CountSketch, KroneckerCountSketch, DenseProjection)


def projector_from_dict(data: Mapping[str, str | int]) -> Projector:
    """Rebuild a projector from what a recipe says of it.

    Raises:
        ValueError: If this version does not know the projector.
    """
    arguments = {key: int(value) for key, value in data.items() if key != "name"}
    for projector in _PROJECTORS:
        if projector.__name__ == data["name"]:
            return projector(**arguments)
    known = ", ".join(projector.__name__ for projector in _PROJECTORS)
    raise ValueError(
        f"The run was sketched by a `{data['name']}`; expected one of {known}. "
        "Read it with the version of tda_lightning that wrote it."
    )


def _shrink(block: Block, width: int, seed: int) -> BlockMap:
    """Fit a block into ``width**2`` numbers; a short side leaves its room to the other."""
    if block.size <= width**2 or block.columns == 1:
        return BlockMap(block.rows, block.columns)
    rows = min(block.rows, max(width, width**2 // block.columns))
    columns = min(block.columns, width**2 // rows)
    return BlockMap(
        block.rows,
        block.columns,
        None if rows == block.rows else sign_matrix(block.rows, rows, seed, f"{block.name}/rows"),
        None
        if columns == block.columns
        else sign_matrix(block.columns, columns, seed, f"{block.name}/columns"),
    )


def _hash_or_lay_out(
    names: Sequence[str], sizes: Sequence[int], dimension: int, seed: int
) -> ColumnMap:
    if sum(sizes) <= dimension:  # Collisions would lose what there is room for.
        return SideBySide(sizes)
    pairs = list(zip(names, sizes, strict=True))
    places = [buckets(size, dimension, seed, f"{name}/buckets") for name, size in pairs]
    flips = [signs(size, seed, f"{name}/signs") for name, size in pairs]
    return Hashed(places, flips, dimension)
