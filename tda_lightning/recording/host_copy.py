"""HostCopy: one copy of several tensors to the CPU, which the device makes in the background."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """A copy of several tensors to the CPU: begun at once, and awaited when it is read.

    All of them travel together. On a GPU the copy goes into pinned memory, so that neither the
    device nor Python waits for it.

    Args:
        tensors: Tensors on one device; those on the CPU are not copied.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._bytes: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if not self.is_ready:
            self._start(self._tensors)

    @property
    def is_ready(self) -> bool:
        """Whether the tensors were on the CPU, so that reading them never waits."""
        return all(tensor.device.type == "cpu" for tensor in self._tensors)

    def read(self) -> list[Tensor]:
        """Wait for the copy, and return the tensors on the CPU."""
        if self._bytes is None:
            return self._tensors
        if self._event is not None:
            self._event.synchronize()
        sizes = [tensor.numel() * tensor.itemsize for tensor in self._tensors]
        parts = torch.split(self._bytes, sizes)
        return [
            # Cloned where the offset is no multiple of the size of a number.
            (part if part.storage_offset() % tensor.itemsize == 0 else part.clone())
            .view(tensor.dtype)
            .view(tensor.shape)
            for part, tensor in zip(parts, self._tensors, strict=True)
        ]

    def _start(self, tensors: Sequence[Tensor]) -> None:
        joined = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
        is_cuda = joined.device.type == "cuda"
        self._bytes = torch.empty(joined.shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._bytes.copy_(joined, non_blocking=True)
        if is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
