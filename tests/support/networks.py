"""Small networks with many kinds of layers, and a dataset for each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset


class Twice(nn.Module):
    """One layer called twice, with an in-place activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu_(self.inner(x))
        return self.head(functional.relu_(self.inner(hidden)))


class Tied(nn.Module):
    """Embedding and head share one weight; only the head has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 7)
        self.head = nn.Linear(7, 5)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh().mean(dim=-2))


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(7, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(7, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + self.up(self.down(x))).relu())


class Bare(nn.Module):
    """Bare parameters beside a child module, with nested inputs and outputs."""

    def __init__(self, entangled: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(7))
        self.shift = nn.Parameter(torch.rand(5, 1))
        self.inner = nn.Linear(7, 5)
        self.entangled = entangled

    def forward(self, nest: dict[str, Any]) -> dict[str, Any]:
        hidden = self.inner(nest["x"][0] * self.scale)
        more = (nest["x"][0][..., :5] * self.shift[:, 0]).unsqueeze(-1)
        return {"out": (hidden, hidden * more[..., 0] if self.entangled else more), "rest": None}


class Nested(nn.Module):
    """A network around :class:`Bare`; if entangled, its two outputs depend on each other."""

    def __init__(self, entangled: bool = False) -> None:
        super().__init__()
        self.bare, self.head = Bare(entangled), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, more = self.bare({"x": (x,), "y": 3})["out"]
        return self.head(hidden + more.reshape(len(x), 5))


class Recurrent(nn.Module):
    """A recurrent layer of which both the outputs and the last hidden state are used."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(7, 5, batch_first=True, **settings)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, hidden = self.rnn(x)
        last = (hidden[0] if isinstance(hidden, tuple) else hidden)[-1]
        return self.head(torch.cat([outputs.mean(dim=1), last], dim=-1))


class Attention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True, **settings)
        self.embed, self.head = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attend(x, x, x)[0].mean(dim=-2))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 7), nn.Linear(11, 3)
        self.inner = nn.Sequential(nn.Linear(7, 11), nn.ReLU(inplace=True), nn.LayerNorm(11))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.head(self.inner(self.first(x)))
        return self.head(checkpoint(self.inner, self.first(x), use_reentrant=self.use_reentrant))


class Bag(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 7, **settings), nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class OffsetBag(nn.Module):
    """Bags defined by offsets, with weighted tokens; token 3 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 7, mode="sum", padding_idx=3)
        self.head = nn.Linear(14, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        n, s = tokens.shape
        weights = (tokens.flatten() + 1).to(self.bag.weight.dtype)
        offsets = torch.arange(n) * s
        bags = self.bag(tokens.flatten(), offsets=offsets, per_sample_weights=weights)
        return self.head(torch.cat([bags, bags.square()], dim=1))


class Tokens(nn.Module):
    """Embed, normalize and pool tokens, of which one may be padding."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 7, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)).tanh().mean(dim=-2))


def in_eval_mode(module: nn.BatchNorm1d) -> nn.Module:
    """Keep a batch norm in evaluation mode, with random running statistics."""
    module.running_mean.uniform_()
    module.running_var.uniform_(1, 2)
    module.training = False
    module.train = lambda mode=True: module
    return module


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def convolution(kind=nn.Conv2d, channels=(2, 5), then=nn.Identity, **settings):
    """Return a convolution, another layer behind it, and a head."""
    conv = kind(*channels, **{"kernel_size": 3, **settings})
    shape = {1: LINE, 2: IMAGE, 3: VOLUME}[len(conv.kernel_size)]
    body = nn.Sequential(conv, then(), nn.ReLU(inplace=True), nn.Flatten())
    width = body(torch.zeros(2, channels[0], *shape[1:])).shape[1]
    return nn.Sequential(*body, nn.Linear(width, 3))


VECTOR, LINE, IMAGE, VOLUME = (7,), (2, 11), (2, 7, 11), (2, 5, 3, 7)


TOKENS, SEQUENCE = "tokens", (5, 7)


NETS = {
    "linear": (lambda: nn.Linear(7, 3), VECTOR),
    "linear without bias": (lambda: nn.Linear(7, 3, bias=False), VECTOR),
    "in-place relu": (
        lambda: nn.Sequential(nn.Linear(7, 11), nn.ReLU(inplace=True), nn.Linear(11, 3)),
        VECTOR,
    ),
    "in-place relu behind a view": (
        lambda: nn.Sequential(
            nn.Linear(7, 11), nn.ReLU(inplace=True), nn.Flatten(-2), nn.Linear(55, 3)
        ),
        SEQUENCE,
    ),
    "called twice": (Twice, VECTOR),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Flatten(-2), nn.Linear(55, 3)),
        SEQUENCE,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        VECTOR,
    ),
    "layer norm over two axes": (
        lambda: nn.Sequential(nn.LayerNorm((5, 7)), nn.Flatten(-2), nn.Linear(35, 3)),
        SEQUENCE,
    ),
    "layer norm without bias": (
        lambda: nn.Sequential(nn.LayerNorm(7, bias=False), nn.Linear(7, 3)),
        VECTOR,
    ),
    "conv": (convolution, IMAGE),
    "conv, stride, dilation and padding": (
        lambda: convolution(stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
        IMAGE,
    ),
    "conv, same padding": (lambda: convolution(padding="same", kernel_size=(3, 5)), IMAGE),
    "conv, circular padding": (lambda: convolution(padding=1, padding_mode="circular"), IMAGE),
    "conv without bias": (lambda: convolution(bias=False), IMAGE),
    "conv 1d": (lambda: convolution(nn.Conv1d, stride=2, padding=1), LINE),
    "conv 3d": (lambda: convolution(nn.Conv3d, kernel_size=(2, 3, 2), padding=1), VOLUME),
    "grouped conv": (
        lambda: convolution(channels=(4, 6), groups=2, stride=2, padding=1),
        (4, 7, 11),
    ),
    "depthwise conv without bias": (
        lambda: convolution(nn.Conv1d, channels=(3, 6), groups=3, bias=False),
        (3, 11),
    ),
    "transposed conv 1d": (
        lambda: convolution(nn.ConvTranspose1d, stride=3, padding=2, output_padding=1),
        LINE,
    ),
    "transposed conv 2d, dilated and grouped": (
        lambda: convolution(
            nn.ConvTranspose2d,
            channels=(4, 6),
            groups=2,
            stride=(2, 1),
            dilation=(3, 2),
            output_padding=(2, 1),
        ),
        (4, 7, 11),
    ),
    "transposed conv without bias": (
        lambda: convolution(nn.ConvTranspose2d, bias=False, padding=1),
        IMAGE,
    ),
    "group norm": (lambda: convolution(channels=(2, 6), then=lambda: nn.GroupNorm(3, 6)), IMAGE),
    "instance norm": (
        lambda: convolution(then=lambda: nn.InstanceNorm2d(5, affine=True)),
        IMAGE,
    ),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(7), nn.Linear(7, 3)), VECTOR),
    "prelu, one slope for all channels": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.PReLU(), nn.Linear(5, 3)),
        VECTOR,
    ),
    "prelu per channel": (lambda: convolution(then=lambda: nn.PReLU(5)), IMAGE),
    "batch norm in evaluation": (
        lambda: nn.Sequential(nn.Linear(7, 5), in_eval_mode(nn.BatchNorm1d(5)), nn.Linear(5, 3)),
        VECTOR,
    ),
    "tied weights": (Tied, TOKENS),
    "low-rank adapter": (Adapted, VECTOR),
    "bare parameters, nested inputs": (Nested, VECTOR),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru, two layers": (lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "attention without bias": (lambda: Attention(bias=False), SEQUENCE),
    "checkpoint": (lambda: Checkpointed(False), VECTOR),
    "reentrant checkpoint": (lambda: Checkpointed(True), VECTOR),
    "embedding bag, mean": (lambda: Bag(mode="mean", padding_idx=3), TOKENS),
    "embedding bag, maximum": (lambda: Bag(mode="max", padding_idx=3), TOKENS),
    "embedding bag, sum": (lambda: Bag(mode="sum"), TOKENS),
    "embedding bag, offsets and weights": (OffsetBag, TOKENS),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(7, 5)), nn.Tanh(), nn.Linear(5, 3)),
        VECTOR,
    ),
    "embedding": (lambda: Tokens(None), TOKENS),
    "embedding with padding": (lambda: Tokens(2), TOKENS),
    "frozen weight": (lambda: frozen(nn.Sequential(nn.Linear(7, 3)), "0.weight"), VECTOR),
    "frozen bias": (lambda: frozen(nn.Sequential(nn.Linear(7, 3)), "0.bias"), VECTOR),
    "frozen scale": (
        lambda: frozen(nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 3)), "0.weight", "1.bias"),
        VECTOR,
    ),
}


def data_of(shape) -> TensorDataset:
    """Return 13 samples of a shape, or token sequences, with labels of three classes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (13,), generator=generator)
    if shape == TOKENS:
        return TensorDataset(torch.randint(5, (13, 11), generator=generator), labels)
    return TensorDataset(torch.randn(13, *shape, generator=generator).double(), labels)
