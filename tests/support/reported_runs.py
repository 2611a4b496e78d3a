"""Small recorded runs with a dataset to report on."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_models import loader, quiet_trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.report import report


class Texts(Dataset[Any]):
    """Texts with a vector and a class each."""

    def __init__(self, texts: list[str], classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.texts, self.vectors = texts, torch.randn(len(texts), 7, generator=generator)
        self.labels = torch.randint(classes, (len(texts),), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index]
        return {"text": self.texts[index], "x": self.vectors[index], "label": label}


class TextClassifier(pl.LightningModule):
    """Classifies the vectors of :class:`Texts`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch["x"]), batch["label"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def report_on_texts(folder: Path, texts: list[str], **settings: Any) -> Path:
    """Train on texts, and report on the same texts as queries."""
    data, model = Texts(texts), TextClassifier()
    recorder = GradientRecorder(folder / "run.tda", projector=Identity())
    quiet_trainer(recorder, max_epochs=5).fit(model, loader(data, batch_size=10))
    queries = loader(data, batch_size=10, shuffle=False)
    path = folder / "report.html"
    return report(
        folder / "run.tda", model, queries, train=data, out=path, progress=False, **settings
    )
