"""HDF5Store: a run in a folder of sealed segments, safe against whatever happens to the process."""

from __future__ import annotations

import bisect
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.recipe import Recipe
from tda_lightning.step import Audit, Preconditioner, Step
from tda_lightning.stores.buffer import StepBuffer
from tda_lightning.stores.encoding import Storage
from tda_lightning.stores.segments import Segment, make_durable, write_segment
from tda_lightning.stores.store import WritableStore

FORMAT = "tda_lightning"
FORMAT_VERSION = 2
_RECIPE = "recipe.json"
_SEGMENTS = "segment-*.h5"
_PARTIAL = ".*.partial"


class HDF5Store(WritableStore):
    """A run in a folder.

    Reading holds one block of steps in memory, at most 8 MB or one step. Writing buffers steps and
    seals them, into a file that never changes again, when they are many, old, or asked to be safe.
    Whatever kills the process, every sealed step stays readable, and none is ever half there.

    Args:
        path: The folder.
        storage: Number format of the rows on disk: as they were computed (float32, or float64 for
            models in double precision), or rounded to float16, bfloat16 or int8.
        segment_bytes: Seal when the buffered rows take this much memory.
        segment_seconds: Seal when the oldest buffered step is this old.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        storage: Storage = "as computed",
        segment_bytes: int = 16 * 2**20,
        segment_seconds: float = 20.0,
    ) -> None:
        self.path = Path(path)
        self._storage = storage
        self._segment_seconds = segment_seconds
        self._recipe: Recipe | None = None
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._count = 0
        self._writing: Future[Segment] | None = None
        self._block: tuple[int, list[Step]] = (0, [])
        # One buffer fills while the other is being written.
        self._buffer, self._spare = StepBuffer(segment_bytes), StepBuffer(segment_bytes)
        self._buffered_since = 0.0

    @classmethod
    def open(cls, path: str | Path) -> HDF5Store:
        """Open a recorded run as it is now, also while it is being recorded.

        Raises:
            FileNotFoundError: If nothing is there.
            ValueError: If what is there is not a run, or one of a newer format.
        """
        store = cls(path)
        store._recipe = _read_recipe(store.path)
        for file in sorted(store.path.glob(_SEGMENTS)):
            store._add_segment(Segment(file))
        store._count = len(store._segments)
        return store

    @property
    def recipe(self) -> Recipe:
        """How the sketches were made."""
        if self._recipe is None:
            self._recipe = _read_recipe(self.path)
        return self._recipe

    @property
    def size_on_disk(self) -> int:
        """Bytes that the run takes."""
        return sum(file.stat().st_size for file in self._files())

    def __len__(self) -> int:
        """Return the number of sealed steps."""
        return self._starts[-1] + len(self._segments[-1]) if self._segments else 0

    def read(self, position: int) -> Step:
        """Return the step at a position, together with its block if that is not at hand."""
        start, steps = self._block
        if not start <= position < start + len(steps):
            number = bisect.bisect_right(self._starts, position) - 1
            segment, base = self._segments[number], self._starts[number]
            block = segment.block_around(position - base)
            start, steps = self._block = (base + block.start, segment.read(block))
        return steps[position - start]

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the ids of the samples that took part in a step, without reading any sketch."""
        parts = [segment.visited_ids() for segment in self._segments]
        ids: Tensor = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *parts]))
        return ids

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of the rows of a step, without reading any sketch."""
        place = range(len(self))[position]
        for start, segment in zip(reversed(self._starts), reversed(self._segments), strict=True):
            found = segment.preconditioner(place - start)
            if found is not None:
                return found
        return None

    def audits(self) -> list[Audit]:
        """Return what the audits of the run found, without reading any sketch."""
        return [audit for segment in self._segments for audit in segment.audits()]

    def begin(self, recipe: Recipe) -> None:
        """Start a new run in a folder that is empty or not there yet."""
        if self.path.exists() and not _is_empty(self.path):
            raise FileExistsError(_what_is_in_the_way(self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, "version": FORMAT_VERSION, "recipe": recipe.to_dict()}
        unfinished = self.path / f".{_RECIPE}.partial"
        unfinished.write_text(json.dumps(document, indent=1))
        make_durable(unfinished)
        unfinished.replace(self.path / _RECIPE)
        make_durable(self.path)
        self._recipe = recipe

    def clear(self) -> None:
        """Delete the run in the folder: its own files, and nothing else."""
        if self.path.exists() and not _is_run(self.path) and not _is_empty(self.path):
            raise FileExistsError(_what_is_in_the_way(self.path))
        # The recipe goes last: a clearing that is interrupted leaves something that can be cleared.
        for file in sorted(self._files(), key=lambda file: file.name == _RECIPE):
            file.unlink()
        self._recipe = None
        self._segments, self._starts, self._block, self._count = [], [], (0, []), 0
        self._buffer.clear()

    def append(self, step: Step) -> None:
        """Add a step; it is sealed with others, now and then."""
        if not self._buffer.has_room_for(step):
            self._start_writing()
        if not self._buffer.steps:
            self._buffered_since = time.monotonic()
        self._buffer.add(step)
        age = time.monotonic() - self._buffered_since
        if self._buffer.is_full() or age >= self._segment_seconds:
            self._start_writing()

    def seal(self) -> None:
        """Write the buffered steps to a new segment, and wait until they are on disk."""
        if self._buffer.steps:
            self._start_writing()
        self._finish_writing()

    def _start_writing(self) -> None:
        """Let the buffered steps be written while training goes on: one segment at a time."""
        self._finish_writing()
        file = self.path / f"segment-{self._count:06d}.h5"
        self._writing = _in_background(partial(_write, file, self._buffer.steps, self._storage))
        self._count += 1
        self._buffer, self._spare = self._spare, self._buffer
        self._buffer.clear()

    def _finish_writing(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._add_segment(writing.result())

    def _add_segment(self, segment: Segment) -> None:
        self._starts.append(len(self))
        self._segments.append(segment)

    def _files(self) -> list[Path]:
        patterns = (_SEGMENTS, _PARTIAL, _RECIPE)
        return list(itertools.chain.from_iterable(self.path.glob(one) for one in patterns))


def _write(file: Path, steps: list[Step], storage: Storage) -> Segment:
    write_segment(file, steps, storage)
    return Segment(file)


def _in_background(work: Callable[[], Segment]) -> Future[Segment]:
    """Start the work in a thread; its result, or its error, waits in the future."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tda_lightning")
    future = executor.submit(work)
    executor.shutdown(wait=False)
    return future


def _read_recipe(path: Path) -> Recipe:
    if not path.exists():
        raise FileNotFoundError(
            f"There is no run at `{path}`: no such folder. Record one with "
            f"`GradientRecorder({str(path)!r})`, or correct the path."
        )
    if not _is_run(path):
        raise ValueError(
            f"`{path}` is not a recorded run: expected a folder with a `{_RECIPE}`, "
            f"found {_describe(path)}. Correct the path."
        )
    document = json.loads((path / _RECIPE).read_text())
    if document.get("format") != FORMAT or document.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"`{path}` is in format {document.get('format')!r}, version {document.get('version')}; "
            f"expected {FORMAT!r}, version {FORMAT_VERSION}. Read it with the version of "
            "tda_lightning that wrote it."
        )
    return Recipe.from_dict(document["recipe"])


def _is_run(path: Path) -> bool:
    return (path / _RECIPE).is_file()


def _is_empty(path: Path) -> bool:
    # A process killed while it began a run leaves a partial recipe: as good as nothing.
    return path.is_dir() and all(entry.match(_PARTIAL) for entry in path.iterdir())


def _describe(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return (
        f"a folder with {shown}{', ...' if len(names) > 3 else ''}" if names else "an empty folder"
    )


def _what_is_in_the_way(path: Path) -> str:
    if _is_run(path):
        return (
            f"`{path}` holds a recorded run already; expected a new place. Choose another path, or "
            "delete the old run by recording with `existing='replace'`."
        )
    return (
        f"`{path}` holds something else than a recorded run, {_describe(path)}; expected an empty "
        "or a new folder. Choose another path: nothing there was touched."
    )
