r"""Projectors: random linear maps from gradients to sketches of dimension ``k``.

They preserve inner products on average: :math:`E \langle Pa, Pb \rangle = \langle a, b \rangle`.
A projector is a frozen set of arguments; :meth:`Projector.bind` turns it into a :class:`Sketcher`
for the blocks of one model. Every map has two parts. First, each layer's matrix is shrunk on both
sides (Kronecker) or left whole. Then the layers are laid side by side or hashed into ``k`` columns
(the count sketch of Charikar, Chen & Farach-Colton 2002).

All random numbers are raw Philox bits, keyed by the seed and the layer's name. They are the same on
every machine, on every device, in every version.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from tda_lightning.gradients.sketching.block_maps import BlockMap
from tda_lightning.gradients.sketching.column_maps import ColumnMap, Hashed, Multiplied, SideBySide
from tda_lightning.gradients.sketching.random_bits import buckets, sign_matrix, signs
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.stores.arguments import require_whole
from tda_lightning.stores.recipe import Block

# Models with at most this many parameters are hashed without shrinking: at most 20 us per sample.
_MAX_UNSHRUNK_PARAMETERS = 2**16
# With more hashed entries per column of a row, wider layers hardly improve accuracy.
_MAX_ENTRIES_PER_COLUMN = 4


@dataclass(frozen=True)
class Projector(ABC):
    """A random linear map from gradients to sketch rows; its arguments are integers."""

    def __post_init__(self) -> None:
        """Check that lengths are at least 1 and the seed at least 0."""
        for name, value in asdict(self).items():
            if not (name == "width" and value is None):
                require_whole(name, value, least=0 if name == "seed" else 1)

    def bind(self, blocks: Sequence[Block], device: torch.device, dtype: torch.dtype) -> Sketcher:
        """Return the linear map for these blocks, on ``device``."""
        chosen = self.chosen_for(blocks)
        block_maps = [chosen._block_map(block).to(device, dtype) for block in blocks]
        names = [block.name for block in blocks]
        column_map = chosen._column_map(names, [block_map.size for block_map in block_maps])
        return Sketcher(block_maps, column_map.to(device, dtype), device, dtype)

    def chosen_for(self, blocks: Sequence[Block]) -> Projector:
        """Return the projector with unset arguments chosen for these blocks."""
        return self

    def to_dict(self) -> dict[str, str | int]:
        """Return the class name and the arguments that are set, for a recipe."""
        arguments = {name: int(value) for name, value in asdict(self).items() if value is not None}
        return {"name": type(self).__name__, **arguments}

    def _block_map(self, block: Block) -> BlockMap:
        """Return the map of a layer's matrix; by default, it is not shrunk."""
        return BlockMap(block.rows, block.columns)

    @abstractmethod
    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap: ...


@dataclass(frozen=True)
class Identity(Projector):
    """No projection: rows are full gradients. Exact, but as long as the model is large."""

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return SideBySide(sizes)


@dataclass(frozen=True)
class Kronecker(Projector):
    """Shrink each layer's matrix to at most ``width**2`` numbers and lay the layers side by side.

    Attributes:
        width: Side length of a shrunk layer.
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
    """Hash every parameter into one of ``dimension`` columns. No shrinking, long hash tables.

    Attributes:
        dimension: Length of a sketch row; shorter if the model has fewer parameters.
        seed: Seed of the hashes and signs.
    """

    dimension: int = 2048
    seed: int = 0

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return _hash_or_lay_out(names, sizes, self.dimension, self.seed)


@dataclass(frozen=True)
class DenseProjection(Projector):
    """Multiply full gradients by a dense matrix of random signs: the slow reference.

    The matrix holds ``dimension`` times as many numbers as the model. Use it only for small models
    and to evaluate other projectors.

    Attributes:
        dimension: Length of a sketch row.
        seed: Seed of the signs.
    """

    dimension: int = 2048
    seed: int = 0

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
        dimension: Length of a sketch row; shorter if the shrunk layers have fewer entries.
        width: Side length of a shrunk layer. By default, small models are not shrunk, because
            shrinking costs more accuracy than hashing. For others it is 32, or less for many
            layers, whose shrunk matrices then still fill the row several times over.
        seed: Seed of the signs and hashes.
    """

    dimension: int = 2048
    width: int | None = None
    seed: int = 0

    def chosen_for(self, blocks: Sequence[Block]) -> Projector:
        """Choose the width if it is unset; more than improves accuracy would only cost time."""
        if self.width is not None:
            return self
        if sum(block.size for block in blocks) <= _MAX_UNSHRUNK_PARAMETERS:
            return replace(self, width=math.isqrt(max(block.size for block in blocks)) + 1)
        matrices = sum(block.columns > 1 for block in blocks)
        max_entries = _MAX_ENTRIES_PER_COLUMN * self.dimension
        widths = [w for w in (32, 16) if matrices * w**2 <= max_entries]
        return replace(self, width=widths[0] if widths else 8)

    def _block_map(self, block: Block) -> BlockMap:
        assert self.width is not None
        return _shrink(block, self.width, self.seed)

    def _column_map(self, names: Sequence[str], sizes: Sequence[int]) -> ColumnMap:
        return _hash_or_lay_out(names, sizes, self.dimension, self.seed)


_PROJECTORS = (Identity, Kronecker, CountSketch, KroneckerCountSketch, DenseProjection)


def projector_from_dict(data: Mapping[str, str | int]) -> Projector:
    """Rebuild a projector from its entry in a recipe.

    Raises:
        ValueError: If this version has no such projector.
    """
    arguments = {key: int(value) for key, value in data.items() if key != "name"}
    for projector in _PROJECTORS:
        if projector.__name__ == data["name"]:
            return projector(**arguments)
    names = ", ".join(projector.__name__ for projector in _PROJECTORS)
    raise ValueError(
        f"The run was sketched by a `{data['name']}`; expected one of {names}. "
        "Read it with the version of tda_lightning that wrote it."
    )


def _shrink(block: Block, width: int, seed: int) -> BlockMap:
    """Shrink a matrix to at most ``width**2`` numbers; beside a short side, the other is longer."""
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
    if sum(sizes) <= dimension:  # All entries fit, so avoid collisions.
        return SideBySide(sizes)
    pairs = list(zip(names, sizes, strict=True))
    bucket_tables = [buckets(size, dimension, seed, f"{name}/buckets") for name, size in pairs]
    sign_tables = [signs(size, seed, f"{name}/signs") for name, size in pairs]
    return Hashed(bucket_tables, sign_tables, dimension)
