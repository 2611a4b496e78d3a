"""Models of plain torch: classics, adapters, and uses of parameters outside of layers."""

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from zoo_cases import LENGTH, VOCABULARY, Batch, Case, Trained, label, noise, tokens, transformers


def vectors(index: int, generator: Generator) -> Batch:
    return {"x": noise(generator, 7), "labels": label(index)}


def sequences(index: int, generator: Generator) -> Batch:
    return {"x": noise(generator, 11, 7), "labels": label(index)}


def pictures(index: int, generator: Generator) -> Batch:
    return {"x": noise(generator, 3, 13, 11), "labels": label(index)}


def texts(index: int, generator: Generator) -> Batch:
    return {"x": tokens(generator, LENGTH), "labels": label(index)}


def vector_pairs(index: int, generator: Generator) -> Batch:
    return {"x": noise(generator, 7), "y": noise(generator, 5), "labels": label(index)}


def augmented_pictures(index: int, generator: Generator) -> Batch:
    """Return two views of one picture."""
    picture = noise(generator, 3, 13, 11)
    views = [picture + 0.1 * noise(generator, 3, 13, 11) for _ in range(2)]
    return {"first": views[0], "second": views[1]}


class Classifier(nn.Module):
    """Cross-entropy on top of a network."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return functional.cross_entropy(self.body(*inputs.values()), labels)


class Recurrent(nn.Module):
    """A recurrent network of which both the outputs and the last hidden state are used."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(7, 9, batch_first=True, **settings)
        sides = 2 if settings.get("bidirectional") else 1
        self.head = nn.Linear(9 * (1 + sides), 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(x)
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return self.head(torch.cat([outputs.mean(dim=1), last], dim=-1))


class Cells(nn.Module):
    """A recurrent cell, called once per position."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 9)
        for position in x.unbind(dim=1):
            state = self.cell(position, state)
        return self.head(state)


class SequenceFirst(nn.Module):
    """A transformer that keeps the samples on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 16)
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=24, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.transpose(0, 1))).mean(dim=0))


class LowRank(nn.Module):
    """A frozen matrix plus a product of two trained ones, multiplied before they meet data."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, d_in) / d_in**0.5)
        self.up = nn.Parameter(torch.randn(d_out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


def peft_lora() -> nn.Module:
    import peft

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, num_labels=3
    )
    config.pad_token_id = 0
    adapters = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["c_attn"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    return peft.get_peft_model(transformers.GPT2ForSequenceClassification(config), adapters)


def adapter_texts(index: int, generator: Generator) -> Batch:
    x = tokens(generator, LENGTH)
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": label(index)}


class OwnParameters(Trained):
    """A LightningModule that holds its weights itself and calls functions only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(11, 7) / 7**0.5)
        self.shift = nn.Parameter(torch.zeros(11))
        self.second = nn.ParameterList([torch.randn(11, 3) / 11**0.5, torch.zeros(3)])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = torch.tanh(batch["x"] @ self.first.T + self.shift)
        logits = torch.addmm(self.second[1], hidden, self.second[0])
        return functional.cross_entropy(logits, batch["labels"])


class Token(nn.Module):
    """A learned token in front of each sequence, and learned positions, scales and mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(12, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.mixing = nn.Parameter(torch.randn(12, 12) / 12**0.5)
        self.embed, self.head = nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        x = torch.einsum("nsd,st->ntd", x + self.positions, self.mixing)
        return self.head((x.tanh() * self.scale)[:, 0])


class Bags(nn.Module):
    """Bags of words, of which the second kind is a maximum and the third has offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(VOCABULARY, 5, mode="mean", padding_idx=6)
        self.sum = nn.EmbeddingBag(VOCABULARY, 4, mode="sum")
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        offsets = torch.arange(0, x.numel(), x.shape[1], device=x.device)
        return self.head(torch.cat([self.mean(x), self.sum(x.flatten(), offsets)], dim=1))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = nn.Bilinear(7, 5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.pair(x, y).tanh())


class TiedAutoencoder(nn.Module):
    """Decodes with the transpose of the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.shift = nn.Linear(7, 4), nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        code = self.encoder(x).tanh()
        decoded = functional.linear(code, self.encoder.weight.T, self.shift)
        return functional.mse_loss(decoded, x)


class Upsampling(nn.Module):
    """An autoencoder of pictures with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        down = nn.Conv2d(3, 6, 3, stride=2)
        up = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.body = nn.Sequential(down, nn.GELU(), up, nn.GELU(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return functional.mse_loss(self.body(x), x)


class TwoViews(Trained):
    """SimCLR: both views of a batch go through the encoder together, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 5, 3, stride=2)
        self.encoder = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(150, 8))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        both = self.encoder(torch.cat([batch["first"], batch["second"]]))
        return tuple(functional.normalize(both, dim=1).chunk(2))

    def loss_of(self, first: Tensor, second: Tensor) -> Tensor:
        both = torch.cat([first, second])
        similarities = (both @ both.T / 0.5).fill_diagonal_(-torch.inf)
        partners = torch.arange(len(both), device=both.device).roll(len(first))
        return functional.cross_entropy(similarities, partners)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss_of(*self.embed(batch))


class Doubled(torch.autograd.Function):
    """A linear map with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, 2 * grad.T @ x


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(9, 7) / 3), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Doubled.apply(x, self.weight).tanh())


def convolutions(*, norm: Any, activation: Any = nn.ReLU) -> nn.Module:
    layers = (nn.Conv2d(3, 6, 3), norm(6), activation(), nn.Conv2d(6, 8, 3, groups=2), norm(8))
    return Classifier(*layers, activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


PLAIN = {
    "mlp": Case(lambda: Classifier(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)), vectors),
    "mlp-weight-norm": Case(
        lambda: Classifier(weight_norm(nn.Linear(7, 11)), nn.Tanh(), weight_norm(nn.Linear(11, 3))),
        vectors,
    ),
    "prelu": Case(
        lambda: Classifier(
            nn.Linear(7, 11), nn.PReLU(), nn.Linear(11, 5), nn.PReLU(5), nn.Linear(5, 3)
        ),
        vectors,
    ),
    "batch-norm": Case(lambda: convolutions(norm=nn.BatchNorm2d), pictures),
    "group-norm": Case(lambda: convolutions(norm=lambda d: nn.GroupNorm(2, d)), pictures),
    "instance-norm": Case(
        lambda: convolutions(norm=lambda d: nn.InstanceNorm2d(d, affine=True)), pictures
    ),
    "upsampling": Case(Upsampling, pictures),
    "bilinear": Case(lambda: Classifier(Bilinear()), vector_pairs),
    "lstm": Case(lambda: Classifier(Recurrent(nn.LSTM, num_layers=2)), sequences),
    "gru": Case(lambda: Classifier(Recurrent(nn.GRU, bidirectional=True)), sequences),
    "gru-cell": Case(lambda: Classifier(Cells()), sequences),
    "sequence-first": Case(lambda: Classifier(SequenceFirst()), sequences),
    "bare-parameters": Case(lambda: Classifier(Token()), sequences),
    "own-parameters": Case(OwnParameters, vectors),
    "own-backward": Case(lambda: Classifier(OwnBackward()), vectors),
    "lora": Case(lambda: Classifier(LowRank(7, 9), nn.Tanh(), LowRank(9, 3)), vectors),
    "peft-lora": Case(peft_lora, adapter_texts, packages=("peft",)),
    "embedding-bag": Case(lambda: Classifier(Bags()), texts),
    "tied-autoencoder": Case(TiedAutoencoder, vectors),
    "simclr": Case(TwoViews, augmented_pictures, has_likelihood=False),
}
