"""The networks of the benchmark `lds.py`: small, and compatible with `vmap`."""

import math

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A network with a separate last layer.

    Attributes:
        body: Everything but the last layer.
        head: The last layer, linear.
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def perceptron(n_inputs: int, hidden: tuple[int, ...], classes: int) -> Network:
    layers: list[nn.Module] = []
    for before, after in zip((n_inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return Network(nn.Sequential(*layers), nn.Linear(hidden[-1], classes))


def convolutional() -> Network:
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
    )
    return Network(body, nn.Linear(16 * 4 * 4, 10))


def normalized() -> Network:
    """Return a CNN with batch norms, behind convolutions that keep their biases."""
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    return Network(body, nn.Linear(64, 10))


class Block(nn.Module):
    """A causal transformer block, from parts that are compatible with `vmap`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.queries_keys_values(self.before_attention(x))
        queries, keys, values = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        future = torch.full((length, length), -math.inf).triu(diagonal=1)
        agreement = queries @ keys.mT / math.sqrt(queries.shape[-1]) + future
        mixed = agreement.softmax(dim=-1) @ values
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.before_feed_forward(x))


class TransformerBody(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.norm(self.blocks(self.tokens(tokens) + self.positions(positions)))


def transformer(vocabulary: int, length: int, width: int, heads: int, depth: int) -> Network:
    head = nn.Linear(width, vocabulary, bias=False)
    return Network(TransformerBody(vocabulary, length, width, heads, depth), head)
