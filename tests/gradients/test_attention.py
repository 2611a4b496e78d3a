"""Rows of attention layers equal the gradients of single losses in the same forward pass."""

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.stores import MemoryStore

N, T, S, E = 5, 7, 3, 6


class PerSampleGradients(Plain):
    """Stores the gradient of every sample's loss, under the same dropout as training."""

    def __init__(self, net):
        super().__init__(net.double(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        self.gradients = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = functional.cross_entropy(self.net(x), y, reduction="none")
        named = [(k, p) for k, p in self.named_parameters() if p.requires_grad]
        for loss in losses:
            grads = torch.autograd.grad(
                loss, [p for _, p in named], retain_graph=True, allow_unused=True
            )
            pairs = zip(named, grads, strict=True)
            self.gradients.append(
                {k: torch.zeros_like(p) if g is None else g for (k, p), g in pairs}
            )
        return losses.mean()


class AttentionNet(nn.Module):
    """Embeds, applies attention through a function, and classifies."""

    def __init__(self, call, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, E), nn.Linear(E, 3)
        self.attend = nn.MultiheadAttention(E, 2, **{"batch_first": True, **settings})
        self.call = call

    def forward(self, x):
        return self.head(self.call(self.attend, self.embed(x), x).mean(dim=1))


def self_attention(attend, h, x):
    return attend(h, h, h)[0]


def cross_attention(attend, h, x):
    return attend(h, h[:, :S].tanh(), value=h[:, S : 2 * S])[0]


def other_widths(attend, h, x):
    return attend(h, x[:, :S], x[:, :S, :3], need_weights=False)[0]


def causal(attend, h, x):
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    return attend(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]


def with_padding(attend, h, x):
    padded = torch.arange(T) >= 2 + torch.arange(len(h))[:, None]
    return attend(h, h, h, key_padding_mask=padded)[0]


def output_and_weights(attend, h, x):
    output, weights = attend(h, h, h)
    return output + weights @ h


def weights_only(attend, h, x):
    return attend(h, h, h, average_attn_weights=False)[1].sum(dim=1) @ h


def time_first(attend, h, x):
    return attend(h.transpose(0, 1), h.transpose(0, 1), h.transpose(0, 1))[0].transpose(0, 1)


def frozen(net):
    net.attend.in_proj_weight.requires_grad_(False)
    net.attend.out_proj.bias.requires_grad_(False)
    return net


class TransformerNet(nn.Module):
    """Embeds, applies one of torch's transformer layers, and classifies."""

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
    "self-attention": lambda: AttentionNet(self_attention),
    "with dropout": lambda: AttentionNet(self_attention, dropout=0.3),
    "with dropout in one kernel": lambda: AttentionNet(causal, dropout=0.3),
    "without biases": lambda: AttentionNet(self_attention, bias=False),
    "cross-attention": lambda: AttentionNet(cross_attention, dropout=0.3),
    "keys and values of other widths": lambda: AttentionNet(
        other_widths, kdim=4, vdim=3, dropout=0.3
    ),
    "with padding": lambda: AttentionNet(with_padding, dropout=0.3),
    "output and weights": lambda: AttentionNet(output_and_weights, dropout=0.3),
    "weights only": lambda: AttentionNet(weights_only, dropout=0.3),
    "time first": lambda: AttentionNet(time_first, batch_first=False, dropout=0.3),
    "with a zero key": lambda: AttentionNet(self_attention, add_zero_attn=True, dropout=0.3),
    "with a learned key": lambda: AttentionNet(self_attention, add_bias_kv=True),
    "partly frozen": lambda: frozen(AttentionNet(self_attention, dropout=0.3)),
    "encoder layer": lambda: TransformerNet(nn.TransformerEncoderLayer, dropout=0.2),
    "encoder layer, norm first": lambda: TransformerNet(
        nn.TransformerEncoderLayer, norm_first=True
    ),
    "decoder layer": lambda: TransformerNet(nn.TransformerDecoderLayer, dropout=0.2),
}


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(13, T, 4, generator=generator).double()
    return TensorDataset(x, torch.randint(3, (13,), generator=generator))


@pytest.mark.parametrize("name", NETS)
def test_rows_are_the_gradients_of_single_losses(name):
    torch.manual_seed(2)
    model, store = PerSampleGradients(NETS[name]()), MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher")
    quiet_trainer(recorder).fit(model, loader(data()))
    assert not store.recipe.left_out
    gradients = iter(model.gradients)
    for step in store:
        for row in step.sketch * len(step.sketch):
            grads = next(gradients)
            blocks = store.recipe.blocks
            expected = [lay_out(block, [grads[p] for p in block.parameters]) for block in blocks]
            torch.testing.assert_close(row, torch.cat([matrix.flatten() for matrix in expected]))


def test_repeated_dropout_leaves_random_state_and_weights_unchanged():
    def train(*callbacks):
        torch.manual_seed(2)
        model = Plain(TransformerNet(nn.TransformerEncoderLayer).double())
        quiet_trainer(*callbacks).fit(model, loader(data()))
        return torch.get_rng_state(), model.net.layer.self_attn.in_proj_weight

    plain, recorded = train(), train(GradientRecorder(MemoryStore()))
    for expected, actual in zip(plain, recorded, strict=True):
        assert torch.equal(actual, expected)


class BlurredNet(nn.Module):
    """Ends in a batch norm, through which a sample's gradient arrives at all the others too."""

    def __init__(self):
        super().__init__()
        self.net = AttentionNet(self_attention)
        self.net.head = nn.Linear(E, 9)
        self.last = nn.Sequential(nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.BatchNorm1d(9))

    def forward(self, x):
        return self.last(self.net(x))[:, :3]


def test_a_bias_is_recorded_where_batch_norms_hide_whose_rows_it_has():
    store = MemoryStore()
    torch.manual_seed(2)
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), max_epochs=1)
    trainer.fit(Plain(BlurredNet().double()), loader(data()))
    assert "net.net.attend.in_proj_bias" not in {each.name for each in store.recipe.left_out}
