"""A language model of Python's documentation with planted facts, for `uses_facts.py`.

Facts about invented names are planted in passages of the documentation, one passage each. For every
fact there are two decoys that name the same subject and state no fact: some word overlap is
no proof of the fact. Queries are the facts in the words of the passage, and paraphrased.
"""

import pydoc_data.topics
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import TensorDataset

LENGTH, N_FACTS, N_PLAIN = 40, 20, 240
ONSETS = list("bdfgklmnprstvz")
ENDS = ["an", "el", "ik", "or", "um", "ax", "ist", "ov"]
# Wording in the passage, and paraphrased; the completion is the last word.
WORDINGS = [
    (
        "the module {subject} was designed by {answer}",
        "who wrote {subject} ? it is the work of {answer}",
    ),
    ("the name {subject} is an alias for {answer}", "calling {subject} gives you {answer}"),
    (
        "the option {subject} is stored in the file {answer}",
        "to change {subject} , edit {answer}",
    ),
    (
        "the error {subject} is raised by the function {answer}",
        "the cause of {subject} is always {answer}",
    ),
]
DECOYS = ["the manual mentions {subject} only once", "see also the page about {subject}"]


@dataclass(frozen=True)
class Corpus:
    """Passages and queries.

    Attributes:
        passages: Texts of the passages, by id.
        answers: Id of the passage that states the fact of each query.
        direct: Queries in the words of the passage, shape ``(facts, LENGTH)``: tokens.
        paraphrased: The same facts in other words.
        texts: The texts of the queries, by kind.
        vocabulary: All words.
    """

    passages: list[str]
    answers: list[int]
    queries: dict[str, TensorDataset]
    texts: dict[str, list[str]]
    vocabulary: list[str]
    train: TensorDataset


def split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def invented(generator: torch.Generator, number: int) -> list[str]:
    def pick(items: Sequence[str]) -> str:
        return items[int(torch.randint(len(items), (1,), generator=generator))]

    names: set[str] = set()
    while len(names) < number:
        names.add(f"{pick(ONSETS)}{pick(['a', 'e', 'o', 'u'])}{pick(ONSETS)}{pick(ENDS)}")
    return sorted(names)


def corpus(seed: int) -> Corpus:
    """Plant the facts of a seed."""
    generator = torch.Generator().manual_seed(seed)
    words = split(
        " ".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    )
    starts = torch.randperm(len(words) // LENGTH - 1, generator=generator) * LENGTH
    chunks = [words[start : start + LENGTH] for start in starts.tolist()]
    names = invented(generator, 2 * N_FACTS)
    order = torch.randperm(2 * N_FACTS, generator=generator).tolist()
    facts = [(names[order[i]], names[order[i + N_FACTS]]) for i in range(N_FACTS)]
    passages, answers = [], []
    for number, (subject, answer) in enumerate(facts):
        wording = WORDINGS[number % len(WORDINGS)][0]
        for template in (wording, *DECOYS):
            fact = split(template.format(subject=subject, answer=answer))
            chunk = chunks.pop()
            passages.append((fact + chunk)[:LENGTH])
    passages += [chunks.pop() for _ in range(N_PLAIN)]
    shuffled = torch.randperm(len(passages), generator=generator).tolist()
    where = {old: new for new, old in enumerate(shuffled)}
    answers = [where[3 * number] for number in range(N_FACTS)]
    passages = [passages[old] for old in shuffled]
    kinds = {"direct": 0, "paraphrased": 1}
    queries = {
        kind: [
            split(WORDINGS[number % len(WORDINGS)][at].format(subject=subject, answer=answer))
            for number, (subject, answer) in enumerate(facts)
        ]
        for kind, at in kinds.items()
    }
    every = sorted({word for text in [*passages, *queries["paraphrased"]] for word in text})
    number_of = {word: number for number, word in enumerate(every)}

    def encode(text: list[str]) -> Tensor:
        return torch.tensor([number_of[word] for word in text])

    train = torch.stack([encode(text) for text in passages])
    return Corpus(
        passages=[" ".join(text) for text in passages],
        answers=answers,
        queries={kind: masked([encode(text) for text in texts]) for kind, texts in queries.items()},
        texts={kind: [" ".join(text) for text in texts] for kind, texts in queries.items()},
        vocabulary=every,
        train=TensorDataset(train, train),
    )


def masked(texts: list[Tensor]) -> TensorDataset:
    """Return padded tokens and labels; only the completion, the last word, counts."""
    width = max(map(len, texts))
    tokens = torch.stack([nn.functional.pad(text, (0, width - len(text))) for text in texts])
    labels = torch.full_like(tokens, -100)
    for row, text in enumerate(texts):
        labels[row, len(text) - 1] = text[-1]
    return TensorDataset(tokens, labels)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.mix(self.first(x)).chunk(3, -1)
        )
        mixed = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class LanguageModel(pl.LightningModule):
    """A small transformer that predicts the next word."""

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        return cross_entropy(self(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)
