"""Text: find wrong labels, and see which texts a decision rests on.

Classifies the documentation strings of Python's standard library by package. A tenth of the
training labels are wrong. The text ships with Python, so nothing is downloaded.
"""

import ast
import sysconfig
import zlib
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, attribute, self_influence
from tda_lightning.metrics import mislabel_recall

PACKAGES = ["asyncio", "email", "unittest", "multiprocessing", "http", "importlib"]
WORDS, LENGTH = 2048, 40


class TextClassifier(pl.LightningModule):
    """A mean of word embeddings, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32, padding_idx=0)
        self.head = nn.Linear(32, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        n_words = (words > 0).sum(dim=1, keepdim=True).clamp_min(1)
        return self.head(self.embedding(words).sum(dim=1) / n_words)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def docstrings(package: str) -> list[str]:
    """Return the documentation strings of a package in the standard library, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    texts = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                texts.append(" ".join(text.split()))
    return [text for text in dict.fromkeys(texts) if len(text) > 40]


def encode(text: str) -> list[int]:
    """Return the hashed words of a text, padded with 0."""
    words = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in text.lower().split()]
    return (words + [0] * LENGTH)[:LENGTH]


def main() -> None:
    pl.seed_everything(0)
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        package_texts = docstrings(package)
        texts += package_texts
        labels += [label] * len(package_texts)
    order = torch.randperm(len(texts)).tolist()
    train_ids, test_ids = order[:-100], order[-100:]
    words, truth = torch.tensor([encode(text) for text in texts]), torch.tensor(labels)
    flipped = torch.rand(len(train_ids)) < 0.1
    wrong = (truth[train_ids] + torch.randint(1, len(PACKAGES), flipped.shape)) % len(PACKAGES)
    train = TensorDataset(words[train_ids], torch.where(flipped, wrong, truth[train_ids]))

    model = TextClassifier()
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=[GradientRecorder("text_classifier.tda", existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    with torch.no_grad():
        answers = model(words[test_ids])
        correct = (answers.argmax(dim=1) == truth[test_ids]).float().mean()
        test_losses = functional.cross_entropy(answers, truth[test_ids], reduction="none")
        logits = model(train.tensors[0])
        losses = functional.cross_entropy(logits, train.tensors[1], reduction="none")
    print(f"\n{len(train)} training texts, test accuracy {correct:.0%}")

    influence = self_influence("text_classifier.tda", progress=False).values
    print(f"{int(flipped.sum())} labels are wrong. Among the 10 % of samples")
    print(f"  of highest self-influence stand {mislabel_recall(influence, flipped):.0%} of them,")
    print(f"  of highest loss                 {mislabel_recall(losses, flipped):.0%}.")

    worst = test_losses.topk(3).indices
    hardest = torch.tensor(test_ids)[worst]
    queries = (words[hardest], truth[hardest])
    scores = attribute("text_classifier.tda", model, queries, progress=False)
    for row, test_id in enumerate(hardest.tolist()):
        taken_for = PACKAGES[answers[worst[row]].argmax()]
        print(f"\n{PACKAGES[truth[test_id]]}, taken for {taken_for}: {texts[test_id][:70]}")
        for role, ranking in (("helped", scores.proponents(2)), ("hurt", scores.opponents(2))):
            for i in ranking.ids[row].tolist():
                mark = " (wrong label)" if flipped[i] else ""
                label = PACKAGES[train.tensors[1][i]]
                print(f"  {role:6s} {label}{mark}: {texts[train_ids[i]][:70]}")


if __name__ == "__main__":
    main()
