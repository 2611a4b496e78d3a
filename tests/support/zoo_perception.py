"""Models of images, sounds, and of images together with text."""

from typing import Any

import torch
from torch import Generator, Tensor, nn
from zoo_cases import (
    LENGTH,
    SMALL,
    VOCABULARY,
    Batch,
    Case,
    Trained,
    images,
    label,
    next_tokens,
    noise,
    tokens,
    transformers,
)
from zoo_encoders import encoder_decoder

CLASSIFY = "ForSequenceClassification"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def image_classifier(name: str, **settings: Any) -> Case:
    def network() -> nn.Module:
        config = getattr(transformers, name + "Config")(num_labels=3, **settings)
        return getattr(transformers, name + "ForImageClassification")(config)

    return Case(network, images)


def vit_like(name: str) -> Case:
    return image_classifier(name, image_size=32, patch_size=8, **SMALL)


def speech(index: int, generator: Generator) -> Batch:
    return {"input_values": noise(generator, 400), "labels": label(index)}


def transcribed_speech(index: int, generator: Generator) -> Batch:
    return {"input_values": noise(generator, 150), "labels": tokens(generator, 3)}


def spectrogram(index: int, generator: Generator) -> Batch:
    return {"input_values": noise(generator, 24, 16), "labels": label(index)}


def transcribed_spectrogram(index: int, generator: Generator) -> Batch:
    return {"input_features": noise(generator, 16, 40), "labels": tokens(generator, 6)}


def segmented_images(index: int, generator: Generator) -> Batch:
    masks = torch.randint(3, (32, 32), generator=generator)
    return {"pixel_values": noise(generator, 3, 32, 32), "labels": masks}


def masked_images(index: int, generator: Generator) -> Batch:
    """Return an image of 16 patches, half of them masked."""
    mask = torch.zeros(16, dtype=torch.bool)
    mask[torch.randperm(16, generator=generator)[:8]] = True
    return {"pixel_values": noise(generator, 3, 32, 32), "bool_masked_pos": mask}


def captioned_images(index: int, generator: Generator) -> Batch:
    sample = next_tokens(index, generator)
    return {**sample, "pixel_values": noise(generator, 3, 32, 32)}


def images_in_text(index: int, generator: Generator) -> Batch:
    """Return a text whose second to fifth token stand for the image."""
    sample = captioned_images(index, generator)
    sample["input_ids"][1:5] = 3
    sample["labels"][:5] = -100
    return sample


def image_questions(index: int, generator: Generator) -> Batch:
    answers = nn.functional.one_hot(label(index), 3).float()
    return {
        "input_ids": tokens(generator, LENGTH),
        "attention_mask": torch.ones(LENGTH, dtype=torch.int64),
        "pixel_values": noise(generator, 3, 32, 32),
        "labels": answers,
    }


def wav2vec_like(name: str, head: str, **settings: Any) -> nn.Module:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = getattr(transformers, name + "Config")(
        vocab_size=VOCABULARY,
        num_feat_extract_layers=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **convolutions,
        **positions,
        **SMALL,
        **settings,
    )
    return getattr(transformers, name + head)(config)


def whisper() -> nn.Module:
    return encoder_decoder(
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=20,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **SPECIAL,
    )


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_labels=3,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def two_towers() -> dict[str, Any]:
    vision = {"image_size": 32, "patch_size": 16, **SMALL}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **SMALL, **SPECIAL}
    return {"vision_config": vision, "text_config": text, "projection_dim": 16}


class Contrastive(Trained):
    """CLIP with its loss over pairs of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = transformers.CLIPModel(transformers.CLIPConfig(**two_towers()))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = self.net(**batch)
        return outputs.image_embeds, outputs.text_embeds

    def loss_of(self, image: Tensor, text: Tensor) -> Tensor:
        logits = text @ image.mT * self.net.logit_scale.exp()
        pairs = torch.arange(len(logits), device=logits.device)
        losses = [nn.functional.cross_entropy(each, pairs) for each in (logits, logits.mT)]
        return sum(losses) / 2

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(**batch, return_loss=True).loss


def image_text_pairs(index: int, generator: Generator) -> Batch:
    sample = captioned_images(index, generator)
    sample["input_ids"][-1] = SPECIAL["eos_token_id"]
    del sample["labels"]
    return sample


def blip() -> nn.Module:
    sizes = {"image_text_hidden_size": 32}
    towers = two_towers()
    text = {**towers["text_config"], "encoder_hidden_size": 32, "sep_token_id": 2}
    config = transformers.BlipConfig(**{**towers, "text_config": text}, **sizes)
    return transformers.BlipForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    text = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SMALL)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def vilt() -> nn.Module:
    settings = {"image_size": 32, "patch_size": 16, "max_position_embeddings": 32, **SMALL}
    config = transformers.ViltConfig(vocab_size=VOCABULARY, num_labels=3, **settings)
    return transformers.ViltForQuestionAnswering(config)


PERCEPTION = {
    "vit": vit_like("ViT"),
    "deit": vit_like("DeiT"),
    "beit": vit_like("Beit"),
    "dinov2": vit_like("Dinov2"),
    "swin": image_classifier(
        "Swin",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "convnext": image_classifier("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "resnet": image_classifier(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
    "mobilenet": image_classifier(
        "MobileNetV2",
        image_size=32,
        depth_multiplier=0.1,
        min_depth=4,
        depth_divisible_by=4,
        output_stride=32,
    ),
    "segformer": Case(segformer, segmented_images),
    "simmim": Case(
        lambda: transformers.ViTForMaskedImageModeling(
            transformers.ViTConfig(image_size=32, patch_size=8, encoder_stride=8, **SMALL)
        ),
        masked_images,
        has_likelihood=False,
    ),
    "wav2vec2": Case(lambda: wav2vec_like("Wav2Vec2", CLASSIFY, num_labels=3), speech),
    "hubert-ctc": Case(
        lambda: wav2vec_like("Hubert", "ForCTC", ctc_loss_reduction="mean"),
        transcribed_speech,
        has_likelihood=False,
    ),
    "whisper": Case(whisper, transcribed_spectrogram),
    "spectrogram": Case(
        lambda: transformers.ASTForAudioClassification(
            transformers.ASTConfig(
                num_labels=3,
                patch_size=8,
                frequency_stride=8,
                time_stride=8,
                max_length=24,
                num_mel_bins=16,
                **SMALL,
            )
        ),
        spectrogram,
    ),
    "clip": Case(Contrastive, image_text_pairs, shared=("net.logit_scale",), has_likelihood=False),
    "blip": Case(blip, captioned_images),
    "llava": Case(llava, images_in_text),
    "vilt": Case(vilt, image_questions),
}
