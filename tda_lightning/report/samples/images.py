"""Thumbnails: images of any layout as small data URIs."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

# Images up to this size are stored exactly, as PNG; larger ones are reduced to it.
MAX_SIDE = 72
_MIN_SIDE = 4


def is_image(value: Any) -> bool:
    """Return whether a value looks like an image.

    Images are PIL images, and arrays of shape ``(h, w)``, ``(c, h, w)`` or ``(h, w, c)`` with 1, 3
    or 4 channels and sides of at least 4.
    """
    if _is_pil(value):
        return True
    if not isinstance(value, Tensor | np.ndarray):
        return False
    shape = tuple(value.shape)
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        shape = shape[1:]
    elif len(shape) == 3 and shape[-1] in (1, 3, 4):
        shape = shape[:-1]
    return len(shape) == 2 and min(shape) >= _MIN_SIDE and _is_numeric(value)


def data_uri(image: Any) -> str:
    """Return an image as a ``data:`` URI, reduced to a side of at most 72 pixels.

    Numbers from 0 to 1, and bytes, are intensities. Other numbers are scaled to their own range.
    """
    pixels = _reduced(pixels_of(image))
    exact = max(pixels.shape[:2]) <= MAX_SIDE // 2
    content, kind = (_png(pixels), "png") if exact else _compressed(pixels)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _is_pil(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "PIL" and hasattr(value, "convert")


def _is_numeric(value: Tensor | NDArray[Any]) -> bool:
    if isinstance(value, Tensor):
        return value.dtype == torch.uint8 or value.is_floating_point()
    return value.dtype == np.uint8 or value.dtype.kind == "f"


def pixels_of(image: Any) -> UInt8[Tensor, "h w c"]:
    """Return an image as bytes, shape ``(h, w, c)``, with 1 or 3 channels."""
    if _is_pil(image):
        return torch.from_numpy(np.array(image.convert("RGB")))
    values = torch.as_tensor(image).detach().cpu()
    if values.ndim == 2:
        values = values[..., None]
    elif values.shape[0] in (1, 3, 4) and values.shape[-1] not in (3, 4):
        values = values.movedim(0, -1)
    values = values[..., :3]
    return values if values.dtype == torch.uint8 else _bytes_of(values)


def _bytes_of(values: Tensor) -> UInt8[Tensor, "h w c"]:
    values = values.double().nan_to_num(0.0, 0.0, 0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / max(high - low, 1e-12)
    return (values * 255).round().to(torch.uint8)


def _reduced(pixels: UInt8[Tensor, "h w c"]) -> UInt8[Tensor, "h2 w2 c"]:
    height, width = pixels.shape[:2]
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    planes = pixels.movedim(-1, 0)[None].float()
    small = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8).movedim(0, -1).contiguous()


def _compressed(pixels: UInt8[Tensor, "h w c"]) -> tuple[bytes, str]:
    """Return a small file: WebP if Pillow is installed (Bokeh brings it along), otherwise PNG."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return _png(pixels), "png"
    array = pixels.expand(-1, -1, 3).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="WEBP", quality=75)
    return file.getvalue(), "webp"


def _png(pixels: UInt8[Tensor, "h w c"]) -> bytes:
    """Encode grey or RGB pixels as PNG (RFC 2083), without any image library."""
    height, width, channels = pixels.shape
    if channels == 2:
        pixels, channels = pixels[..., :1], 1
    lines = pixels.contiguous().numpy().reshape(height, width * channels)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in parts)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
