"""Lightning's types, of either package.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code with distinct classes. A callback
of the one works in a trainer of the other, since hooks are looked up by name; only the types
differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
else:
    LightningModule = Trainer = Any

__all__ = ["LightningModule", "Trainer"]
