"""Networks made of random parts, which nobody chose to fit together."""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

D, T, VOCABULARY = 6, 4, 11


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Checkpointed(Residual):
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class Reentrant(Checkpointed):
    use_reentrant = True


class PositionsFirst(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Flattened(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Windows(Residual):
    """Pairs of neighbouring tokens, joined with the samples."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (T // 2, 2)).permute(2, 0, 1, 3)
        return self.inner(pairs.reshape(-1, D)).view_as(pairs).permute(1, 2, 0, 3).flatten(1, 2)


class Loop(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(x[:, place]) for place in range(x.shape[1])], dim=1)


class Channels(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class Recurrent(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attend(x, x, x)[0].transpose(0, 1)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.token = nn.Embedding(T, D), nn.Parameter(torch.randn(1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return joined[:, 1:] + self.embedding(torch.arange(T)) + joined[:, :1]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.inner(x).chunk(2, dim=-1)
        return values * gates.sigmoid()


class Bare(nn.Module):
    """Parameters without modules: a product, a scale, and a normalized matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.other = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, D))
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        normalized = self.other / self.other.norm(dim=1, keepdim=True)
        product = torch.einsum("...i,ij->...j", x, self.matrix / D)
        return nn.functional.linear(product, normalized) * self.scale + self.shift


class Adapted(nn.Module):
    """A frozen layer with an adapter of rank two."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Experts(nn.Module):
    """Every row goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        shares = self.router(rows).softmax(dim=-1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = (shares.argmax(dim=-1) == number).nonzero()[:, 0]
            if len(chosen):
                weighted = expert(rows[chosen]) * shares[chosen, number, None]
                result = result.index_add(0, chosen, weighted)
        return result.view_as(x)


Part = Callable[[], nn.Module]
POINTWISE: list[Part] = [
    lambda: nn.Linear(D, D),
    lambda: nn.Sequential(nn.Linear(D, 7, bias=False), nn.GELU(), nn.Linear(7, D)),
    lambda: nn.LayerNorm(D),
    lambda: nn.PReLU(),
    lambda: Twice(nn.Linear(D, D)),
    lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    lambda: parametrizations.orthogonal(nn.Linear(D, D)),
    *(Gated, Bare, Adapted, Experts),
]
OF_SEQUENCES: list[Part] = [
    lambda: Recurrent(nn.LSTM(D, D, batch_first=True)),
    lambda: PositionsFirst(Recurrent(nn.GRU(D, D))),
    lambda: Channels(nn.Conv1d(D, D, 3, padding=1, groups=3)),
    lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True),
    lambda: nn.LayerNorm((T, D)),
    *(Attention, Positions),
]
AROUND_ROWS = [PositionsFirst, Flattened, Windows, Loop]


def random_block(draw: random.Random, *, is_sequence: bool) -> nn.Module:
    """Return a random part, or a few, one around the other."""
    if is_sequence and draw.random() < 0.3:
        block = draw.choice(AROUND_ROWS)(random_block(draw, is_sequence=False))
    else:
        block = draw.choice(POINTWISE + (OF_SEQUENCES if is_sequence else []))()
    if draw.random() < 0.3:
        block = Residual(block)
    return draw.choice([Checkpointed, Reentrant])(block) if draw.random() < 0.25 else block


class RandomNetwork(nn.Module):
    """Some random blocks between a first layer for one kind of data and a head."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(["vectors", "sequences", "tokens", "images"])
        is_sequence = self.kind in ("sequences", "tokens")
        self.first: nn.Module = {
            "vectors": lambda: nn.Linear(5, D),
            "sequences": lambda: nn.Linear(3, D),
            "tokens": lambda: nn.Embedding(VOCABULARY, D, padding_idx=0),
            "images": lambda: nn.Sequential(nn.Conv2d(2, D, 3), nn.GroupNorm(2, D)),
        }[self.kind]()
        activations: list[Part] = [nn.Tanh, nn.SiLU, nn.Identity]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    random_block(draw, is_sequence=is_sequence), draw.choice(activations)()
                )
                for _ in range(draw.randint(1, 3))
            )
        )
        self.pool = draw.choice(["mean", "first", "none"]) if is_sequence else "none"
        self.head = nn.Linear(D, draw.choice([2, 3, 5]))

    @property
    def has_labels_of_tokens(self) -> bool:
        """Whether there is one label per token."""
        return self.kind in ("sequences", "tokens") and self.pool == "none"

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = self.blocks(hidden.mean(dim=(2, 3)) if self.kind == "images" else hidden)
        if self.pool == "mean":
            hidden = hidden.mean(dim=1)
        return self.head(hidden[:, 0] if self.pool == "first" else hidden)

    def draw_inputs(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the inputs of ``n`` samples."""
        if self.kind == "tokens":
            return torch.randint(VOCABULARY, (n, T), generator=generator)
        shape = {"vectors": (5,), "sequences": (T, 3), "images": (2, 5, 5)}[self.kind]
        return torch.randn(n, *shape, generator=generator).double()
