"""Rows of attention: against gradients of single losses, taken from the very same forward pass."""

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.layers import select_layers
from tda_lightning.stores import MemoryStore

N, T, S, E = 5, 7, 3, 6


class Watching(Plain):
    """Keeps the gradient of every sample's loss, dropout and all."""

    def __init__(self, net):
        super().__init__(net.double(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        self.truth = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = functional.cross_entropy(self.net(x), y, reduction="none")
        named = [(k, p) for k, p in self.named_parameters() if p.requires_grad]
        for loss in losses:
            found = torch.autograd.grad(
                loss, [p for _, p in named], retain_graph=True, allow_unused=True
            )
            grads = zip(named, found, strict=True)
            self.truth.append({k: torch.zeros_like(p) if g is None else g for (k, p), g in grads})
        return losses.mean()


class Attends(nn.Module):
    """Embeds, attends in some way, and classifies."""

    def __init__(self, way, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, E), nn.Linear(E, 3)
        self.attend = nn.MultiheadAttention(E, 2, **{"batch_first": True, **settings})
        self.way = way

    def forward(self, x):
        return self.head(self.way(self.attend, self.embed(x), x).mean(dim=1))


def to_itself(attend, h, x):
    return attend(h, h, h)[0]


def to_others(attend, h, x):
    return attend(h, h[:, :S].tanh(), value=h[:, S : 2 * S])[0]


def to_other_widths(attend, h, x):
    return attend(h, x[:, :S], x[:, :S, :3], need_weights=False)[0]


def causally(attend, h, x):
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    return attend(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]


def past_padding(attend, h, x):
    padded = torch.arange(T) >= 2 + torch.arange(len(h))[:, None]
    return attend(h, h, h, key_padding_mask=padded)[0]


def swapped_weights(attend, h, x):
    answer, weights = attend(h, h, h)
    return answer + weights @ h


def by_weights_alone(attend, h, x):
    return attend(h, h, h, average_attn_weights=False)[1].sum(dim=1) @ h


def time_first(attend, h, x):
    return attend(h.transpose(0, 1), h.transpose(0, 1), h.transpose(0, 1))[0].transpose(0, 1)


def frozen(net):
    net.attend.in_proj_weight.requires_grad_(False)
    net.attend.out_proj.bias.requires_grad_(False)
    return net


class Layer(nn.Module):
    """One of torch's own transformer layers, with their own dropout."""

    def __init__(self, kind, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, E), nn.Linear(E, 3)
        self.layer = kind(E, 2, 11, batch_first=True, **settings)

    def forward(self, x):
        h = self.embed(x)
        decodes = isinstance(self.layer, nn.TransformerDecoderLayer)
        return self.head((self.layer(h, h.tanh()) if decodes else self.layer(h)).mean(dim=1))


NETS = {
    "to itself": lambda: Attends(to_itself),
    "with dropout": lambda: Attends(to_itself, dropout=0.3),
    "with dropout in one kernel": lambda: Attends(causally, dropout=0.3),
    "without biases": lambda: Attends(to_itself, bias=False),
    "to others": lambda: Attends(to_others, dropout=0.3),
    "to other widths": lambda: Attends(to_other_widths, kdim=4, vdim=3, dropout=0.3),
    "past padding": lambda: Attends(past_padding, dropout=0.3),
    "with its weights": lambda: Attends(swapped_weights, dropout=0.3),
    "by its weights alone": lambda: Attends(by_weights_alone, dropout=0.3),
    "time first": lambda: Attends(time_first, batch_first=False, dropout=0.3),
    "to zero too": lambda: Attends(to_itself, add_zero_attn=True, dropout=0.3),
    "to learnt keys too": lambda: Attends(to_itself, add_bias_kv=True),
    "partly frozen": lambda: frozen(Attends(to_itself, dropout=0.3)),
    "encoder layer": lambda: Layer(nn.TransformerEncoderLayer, dropout=0.2),
    "encoder layer, norm first": lambda: Layer(nn.TransformerEncoderLayer, norm_first=True),
    "decoder layer": lambda: Layer(nn.TransformerDecoderLayer, dropout=0.2),
}


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(13, T, 4, generator=generator).double()
    return TensorDataset(x, torch.randint(3, (13,), generator=generator))


@pytest.mark.parametrize("name", NETS)
def test_rows_are_the_gradients_of_single_losses(name):
    torch.manual_seed(2)
    model, store = Watching(NETS[name]()), MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher")
    quiet_trainer(recorder).fit(model, loader(data()))
    assert not store.recipe.left_out
    sources = [source for source, *_ in select_layers(model).sources]
    truth = iter(model.truth)
    for step in store:
        for row in step.sketch * len(step.sketch):
            grads = next(truth)
            blocks = zip(store.recipe.blocks, sources, strict=True)
            expected = [s.rule.layout([grads[p] for p in b.parameters]) for b, s in blocks]
            torch.testing.assert_close(row, torch.cat([one.flatten() for one in expected]))


def test_dropping_again_leaves_random_numbers_alone():
    def train(*callbacks):
        torch.manual_seed(2)
        model = Plain(Layer(nn.TransformerEncoderLayer).double())
        quiet_trainer(*callbacks).fit(model, loader(data()))
        return torch.get_rng_state(), model.net.layer.self_attn.in_proj_weight

    for one, other in zip(train(), train(GradientRecorder(MemoryStore())), strict=True):
        assert torch.equal(one, other)
