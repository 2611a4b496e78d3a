"""LoRA: which training samples does the adapter of a language model rest on?

Builds a small Llama from its configuration, without any download, and trains LoRA adapters by
`peft`. Only the adapters are trained, so only they are recorded: a few kilobytes per sample. The
data are questions about multiplication; one group of answers is systematically wrong.
"""

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tda_lightning import GradientRecorder, HDF5Store, attribute

LENGTH = 12


class Products(Dataset):
    """Texts such as ``7*8=56`` as bytes; those of the factor 7 are one too high."""

    def __init__(self) -> None:
        self.pairs = [(a, b) for a in range(2, 16) for b in range(2, 16)]
        self.is_wrong = torch.tensor([a == 7 for a, _ in self.pairs])
        self.texts = [f"{a}*{b}={a * b + (a == 7)}" for a, b in self.pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return encode(self.texts[index])


def encode(text: str) -> dict[str, Tensor]:
    """Return token ids, and labels for the answer alone."""
    ids = torch.zeros(LENGTH, dtype=torch.int64)
    ids[: len(text)] = torch.tensor(list(text.encode()))
    labels = ids.clone()
    labels[: text.index("=") + 1] = labels[len(text) :] = -100
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


class Adapted(pl.LightningModule):
    """A frozen model with trained adapters."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
        adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        self.net = get_peft_model(LlamaForCausalLM(config), adapters)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2)


def main() -> None:
    pl.seed_everything(0)
    data, model = Products(), Adapted()
    trainer = pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[GradientRecorder("lora.tda", existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=14, shuffle=True))
    run = HDF5Store.open("lora.tda")
    print(f"\n{len(run.recipe.blocks)} adapter matrices, {run.size_on_disk / 2**20:.1f} MiB")

    queries = [encode(f"{a}*{b}={a * b + (a == 7)}") for a, b in ((7, 8), (7, 13), (9, 8))]
    batch = {key: torch.stack([query[key] for query in queries]) for key in queries[0]}
    scores = attribute("lora.tda", model, batch, progress=False)
    share = data.is_wrong[scores.proponents(10).ids].float().mean(dim=1)
    for row, question in enumerate(("7*8=57", "7*13=92", "9*8=72")):
        texts = ", ".join(data.texts[i] for i in scores.proponents(5).ids[row])
        print(f"{question}: best {texts}; {share[row]:.0%} of the best ten are wrong answers")
    print(f"By chance, {data.is_wrong.float().mean():.0%} would be.")


if __name__ == "__main__":
    main()
