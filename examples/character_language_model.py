"""A language model: which passages taught it to continue this sentence?

Trains a character-level transformer on the help pages of Python's keywords and types. Each query is
a sentence that the model has never seen; its proponents are passages. They should come from the
page that the sentence is about.
"""

import pydoc_data.topics

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import (
    GradientRecorder,
    GradientSimilarity,
    InfluenceFunction,
    TracIn,
    Unrolled,
    attribute,
)

LENGTH, PAGES = 128, ["with", "dict", "lambda", "import", "class", "while", "strings", "numbers"]
QUERIES = {
    "with": "The context manager's exit method runs when the block of the with statement ends",
    "dict": "A dictionary maps keys to values; keys must be hashable, and values may be anything",
    "lambda": "Lambda expressions yield a function object without a name, and hold an expression",
    "import": "The import statement finds a module, loads it, and binds its name in the namespace",
    "class": "A class definition binds the class name; base classes stand in the inheritance list",
    "while": "While the condition is true, the suite is executed; else runs when it becomes false",
}


class LanguageModel(pl.LightningModule):
    """A small causal transformer over bytes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.places.weight[:length]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        logits = self(tokens[:, :-1]).transpose(1, 2)
        return functional.cross_entropy(logits, tokens[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace")))


def passages() -> tuple[list[str], list[str]]:
    """Return passages of equal length, and the page of each."""
    texts, pages = [], []
    for page in PAGES:
        text = " ".join(pydoc_data.topics.topics[page].split())[:6400]
        parts = [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH, LENGTH)]
        texts += parts
        pages += [page] * len(parts)
    return texts, pages


def main() -> None:
    pl.seed_everything(0)
    texts, pages = passages()
    train = TensorDataset(torch.stack([encode(text) for text in texts]))
    model = LanguageModel()
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=[GradientRecorder("characters.tda", existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True))

    length = min(map(len, QUERIES.values()))
    queries = (torch.stack([encode(text[:length]) for text in QUERIES.values()]),)
    is_from = torch.tensor([[page == wanted for page in pages] for wanted in QUERIES])
    print(f"\n{len(texts)} passages of {len(PAGES)} pages. Of the five strongest proponents of a")
    print(f"query, this share is from its page (by chance {is_from.float().mean():.0%}):")
    for method in (InfluenceFunction(), Unrolled(), TracIn(), GradientSimilarity()):
        scores = attribute("characters.tda", model, queries, method=method, progress=False)
        share = is_from.gather(1, scores.proponents(5).ids).float().mean()
        print(f"  {type(method).__name__:18s} {share:.0%}")

    for row, (page, text) in enumerate(QUERIES.items()):
        print(f"\n{page}: {text[:length]}")
        for i in scores.proponents(2).ids[row].tolist():
            print(f"  {pages[i]:8s} {texts[i][:90]}")


if __name__ == "__main__":
    main()
