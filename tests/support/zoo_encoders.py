"""Encoders and sequence-to-sequence models of text, and forecasters of time series."""

from typing import Any

import torch
from torch import Generator, nn
from zoo_cases import (
    LENGTH,
    SMALL,
    VOCABULARY,
    Batch,
    Case,
    classified_tokens,
    next_tokens,
    noise,
    token_pairs,
    transformers,
)


def model(name: str, config_name: str, **settings: Any) -> nn.Module:
    return getattr(transformers, name)(getattr(transformers, config_name)(**settings))


def classifier(name: str, **settings: Any) -> Case:
    """Return a classifier of token sequences into three classes."""
    settings = {"vocab_size": VOCABULARY, "num_labels": 3, **settings}
    return Case(
        lambda: model(name + "ForSequenceClassification", name + "Config", **settings),
        classified_tokens,
    )


def bert_like(name: str, **settings: Any) -> Case:
    return classifier(name, **{"max_position_embeddings": 32, **SMALL, **settings})


def bert(head: str, **settings: Any) -> nn.Module:
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **SMALL, **settings}
    return model("BertFor" + head, "BertConfig", **settings)


def t5(name: str = "T5", **settings: Any) -> Case:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    settings = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, **sizes, **settings}
    return Case(
        lambda: model(name + "ForConditionalGeneration", name + "Config", **settings), token_pairs
    )


def encoder_decoder(name: str, **settings: Any) -> nn.Module:
    """Return a BART-like model: two layers on each side."""
    sides = {
        f"{side}_{size}": value
        for side in ("encoder", "decoder")
        for size, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    return model(name, name.split("For")[0] + "Config", d_model=32, **sides, **settings)


def bart_like(name: str) -> Case:
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    return Case(lambda: encoder_decoder(name + "ForConditionalGeneration", **settings), token_pairs)


def spans(index: int, generator: Generator) -> Batch:
    """Return a text whose answer begins and ends at two positions."""
    sample = classified_tokens(index, generator)
    del sample["labels"]
    begin = torch.tensor(index % LENGTH)
    return {**sample, "start_positions": begin, "end_positions": (begin + 2).clamp_max(LENGTH - 1)}


def tagged_tokens(index: int, generator: Generator) -> Batch:
    sample = classified_tokens(index, generator)
    return {**sample, "labels": torch.randint(3, (LENGTH,), generator=generator)}


def series(index: int, generator: Generator) -> Batch:
    """Return one channel's past and future."""
    return {
        "past_values": noise(generator, 16, 1),
        "future_values": noise(generator, 4, 1),
    }


def dated_series(index: int, generator: Generator) -> Batch:
    """Return a past, with lags before it, and a future, both with a feature of time."""
    return {
        "past_values": noise(generator, 9),
        "past_time_features": noise(generator, 9, 1),
        "past_observed_mask": torch.ones(9),
        "future_values": noise(generator, 4),
        "future_time_features": noise(generator, 4, 1),
    }


def perceiver() -> nn.Module:
    return model(
        "PerceiverForSequenceClassification",
        "PerceiverConfig",
        vocab_size=VOCABULARY,
        num_labels=3,
        num_latents=6,
        d_latents=32,
        d_model=24,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=16,
        v_channels=32,
        max_position_embeddings=32,
    )


def reformer() -> nn.Module:
    """Return a model of reversible layers: a custom function that computes its inputs again."""
    return model(
        "ReformerForSequenceClassification",
        "ReformerConfig",
        vocab_size=VOCABULARY,
        num_labels=3,
        hidden_size=32,
        attention_head_size=8,
        num_attention_heads=4,
        feed_forward_size=64,
        attn_layers=["local", "local"],
        local_attn_chunk_length=4,
        axial_pos_shape=(3, 4),
        axial_pos_embds_dim=(16, 16),
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    )


def patch_forecaster() -> nn.Module:
    sizes = {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
    return model(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        num_input_channels=1,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        norm_type="layernorm",
        loss="mse",
        **sizes,
    )


def time_series_transformer() -> nn.Module:
    return encoder_decoder(
        "TimeSeriesTransformerForPrediction",
        prediction_length=4,
        context_length=6,
        lags_sequence=[1, 2, 3],
        num_time_features=1,
    )


ENCODERS = {
    "bert": Case(lambda: bert("SequenceClassification", num_labels=3), classified_tokens),
    "bert-mlm": Case(lambda: bert("MaskedLM"), next_tokens),
    "bert-tags": Case(lambda: bert("TokenClassification", num_labels=3), tagged_tokens),
    "bert-spans": Case(lambda: bert("QuestionAnswering"), spans),
    "distilbert": classifier("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "roberta": bert_like("Roberta"),
    "deberta": bert_like("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "electra": bert_like("Electra", embedding_size=16),
    "albert": bert_like("Albert", embedding_size=16),
    "modernbert": bert_like("ModernBert", pad_token_id=0, cls_token_id=1, sep_token_id=2),
    "longformer": bert_like("Longformer", attention_window=4, max_position_embeddings=40),
    "fnet": bert_like("FNet", tpu_short_seq_length=LENGTH),
    "funnel": classifier(
        "Funnel",
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
    ),
    "perceiver": Case(perceiver, classified_tokens),
    # Its reversible layers refuse to train in evaluation mode.
    "reformer": Case(reformer, classified_tokens, mode="train"),
    "t5": t5(),
    "t5-gated": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "switch": t5(
        "SwitchTransformers",
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "longt5": t5("LongT5", local_radius=3),
    "bart": bart_like("Bart"),
    "pegasus": bart_like("Pegasus"),
    "patchtst": Case(patch_forecaster, series),
    "time-series": Case(time_series_transformer, dated_series, has_likelihood=False),
}
