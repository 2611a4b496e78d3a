"""Language models that predict the next token: dense, mixtures of experts, state spaces."""

from typing import Any

from torch import nn
from zoo_cases import (
    SMALL,
    VOCABULARY,
    Case,
    next_tokens,
    padded_next_tokens,
    predicted_tokens,
    transformers,
)


def model(name: str, **settings: Any) -> nn.Module:
    """Return a model with a language-modelling head, from the config of the same name."""
    config_name = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Config"
    config = getattr(transformers, config_name)(vocab_size=VOCABULARY, **settings)
    return getattr(transformers, name)(config)


def llama_like(name: str, **settings: Any) -> Case:
    return Case(lambda: model(name, **{**SMALL, "num_key_value_heads": 2, **settings}), next_tokens)


def gpt2() -> nn.Module:
    return model("GPT2LMHeadModel", n_positions=32, n_embd=32, n_layer=2, n_head=4)


EXPERTS = {"num_experts_per_tok": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

DECODERS = {
    "gpt2": Case(gpt2, next_tokens),
    "gpt2-padded": Case(gpt2, padded_next_tokens, terms=predicted_tokens),
    "llama": llama_like("LlamaForCausalLM", num_key_value_heads=4),
    "llama-tied": llama_like("LlamaForCausalLM", tie_word_embeddings=True),
    "mistral": llama_like("MistralForCausalLM"),
    "qwen2": llama_like("Qwen2ForCausalLM"),
    "qwen3": llama_like("Qwen3ForCausalLM", head_dim=8),
    "gemma2": llama_like("Gemma2ForCausalLM", head_dim=8),
    "phi3": llama_like("Phi3ForCausalLM", **SPECIAL),
    "olmo2": llama_like("Olmo2ForCausalLM"),
    "opt": Case(
        lambda: model(
            "OPTForCausalLM",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=32,
        ),
        next_tokens,
    ),
    "bloom": Case(
        lambda: model("BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4), next_tokens
    ),
    "gpt-neox": Case(lambda: model("GPTNeoXForCausalLM", **SMALL), next_tokens),
    "gptj": Case(
        lambda: model(
            "GPTJForCausalLM", n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
        ),
        next_tokens,
    ),
    "falcon": Case(
        lambda: model(
            "FalconForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ),
        next_tokens,
    ),
    "mixtral": llama_like("MixtralForCausalLM", num_local_experts=4, **EXPERTS),
    "qwen2-moe": llama_like(
        "Qwen2MoeForCausalLM",
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        **EXPERTS,
    ),
    "olmoe": llama_like("OlmoeForCausalLM", num_experts=4, **EXPERTS),
    "gpt-oss": llama_like("GptOssForCausalLM", num_local_experts=4, head_dim=8, **EXPERTS),
    "deepseek-v3": llama_like(
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        **EXPERTS,
    ),
    "mamba": Case(
        lambda: model("MambaForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4),
        next_tokens,
    ),
    "mamba2": Case(
        lambda: model(
            "Mamba2ForCausalLM",
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            num_heads=8,
            head_dim=8,
            n_groups=2,
            chunk_size=4,
        ),
        next_tokens,
    ),
    "falcon-mamba": Case(
        lambda: model("FalconMambaForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4),
        next_tokens,
    ),
    "recurrent-gemma": Case(
        lambda: model(
            "RecurrentGemmaForCausalLM",
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "attention"],
            **SMALL,
        ),
        next_tokens,
    ),
    "jamba": llama_like(
        "JambaForCausalLM",
        num_experts=4,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        **EXPERTS,
    ),
    "qwen3-next": llama_like(
        "Qwen3NextForCausalLM",
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **EXPERTS,
    ),
    "xlnet": Case(
        lambda: model("XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=64), next_tokens
    ),
}
