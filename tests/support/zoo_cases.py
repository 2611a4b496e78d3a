"""The zoo: architectures that others wrote, each tiny, built from its config and never loaded.

A case has a network, called with the entries of a batch, and the samples that it is trained on. The
network returns its loss, or an object that has it. The models are in `zoo_decoders`,
`zoo_encoders`, `zoo_perception` and `zoo_plain`.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset, default_collate

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
try:
    import transformers
except ImportError:
    transformers = None  # Its models are skipped.

VOCABULARY, LENGTH = 97, 12
# Sizes that most configs share.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}

Batch = dict[str, Tensor]


def one_term_per_sample(batch: Batch) -> Tensor:
    """Return the number of loss terms of each sample: one."""
    return torch.ones(len(next(iter(batch.values()))), dtype=torch.int64)


def predicted_tokens(batch: Batch) -> Tensor:
    """Return the number of next tokens that each sample's loss averages."""
    return (batch["labels"][:, 1:] != -100).sum(dim=1)


@dataclass(frozen=True)
class Case:
    """An architecture with its data.

    Attributes:
        network: Builds the network, or a LightningModule with its own training step.
        sample: Returns the entries of one sample, drawn from a generator, given its index.
        terms: Number of loss terms of each sample; the loss is their mean over the batch.
        has_likelihood: Whether labels can be sampled from the model's predictions.
        mode: Mode in which rows are compared; without dropout or batch statistics to be exact.
        packages: Packages that the network is built with.
        shared: Parameters whose gradient is no sum over samples; they are not compared.
    """

    network: Callable[[], nn.Module]
    sample: Callable[[int, Generator], Batch]
    terms: Callable[[Batch], Tensor] = one_term_per_sample
    has_likelihood: bool = True
    mode: Literal["eval", "train"] = "eval"
    packages: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def module(self, dtype: torch.dtype = torch.float32) -> pl.LightningModule:
        """Return a new LightningModule with the same initial weights each time."""
        torch.manual_seed(0)
        with quiet():
            network = self.network().to(dtype)
        if dtype == torch.float64 and hasattr(network, "set_experts_implementation"):
            # The fused product of all experts has no kernel for float64.
            network.set_experts_implementation("eager")
        return network if isinstance(network, pl.LightningModule) else Wrapped(network)

    def batch(self, n: int, dtype: torch.dtype = torch.float32) -> Batch:
        """Return the first ``n`` samples as one batch."""
        return default_collate([self.dataset(n, dtype)[i] for i in range(n)])

    def dataset(self, n: int, dtype: torch.dtype = torch.float32) -> Dataset[Batch]:
        """Return ``n`` samples, floating-point entries in ``dtype``."""
        samples = [self.sample(i, Generator().manual_seed(i)) for i in range(n)]
        return Samples([{k: as_dtype(v, dtype) for k, v in each.items()} for each in samples])


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings: of other libraries about tiny configs, and about parameters left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


class Samples(Dataset[Batch]):
    def __init__(self, samples: list[Batch]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Batch:
        return self._samples[index]


class Trained(pl.LightningModule):
    """A module trained by AdamW; bases define the training step."""

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


class Wrapped(Trained):
    """Trains a network that computes its own loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs = self.net(**batch)
        return outputs if isinstance(outputs, Tensor) else outputs.loss


def tokens(generator: Generator, *shape: int) -> Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(5, VOCABULARY, shape, generator=generator)


def noise(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def label(index: int) -> Tensor:
    """Return one of three classes."""
    return torch.tensor(index % 3)


def next_tokens(index: int, generator: Generator) -> Batch:
    x = tokens(generator, LENGTH)
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()}


def padded_next_tokens(index: int, generator: Generator) -> Batch:
    sample = next_tokens(index, generator)
    length = 4 + index % 8
    sample["attention_mask"][length:] = 0
    sample["labels"][length:] = -100
    return sample


def classified_tokens(index: int, generator: Generator) -> Batch:
    x = tokens(generator, LENGTH)
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": label(index)}


def token_pairs(index: int, generator: Generator) -> Batch:
    return {
        "input_ids": tokens(generator, LENGTH),
        "attention_mask": torch.ones(LENGTH, dtype=torch.int64),
        "labels": tokens(generator, 7),
    }


def images(index: int, generator: Generator) -> Batch:
    return {"pixel_values": noise(generator, 3, 32, 32), "labels": label(index)}
