"""Tiny random models and hand-made groups that several test files use."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.data.groups import Comparison, PromptGroup

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 7, "sliding_window_pattern": 2},
    "cohere2": {"sliding_window": 7, "logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_oss": {"sliding_window": 7, **_EXPERTS},
    "phi3": {"sliding_window": 7},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "mixtral": {"sliding_window": 7, **_EXPERTS},
    "qwen3_moe": {"moe_intermediate_size": 24, **_EXPERTS},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
"""Models whose prompts are shared."""

MIXTURES = ("gpt_oss", "mixtral", "qwen3_moe")
"""Those among them that send each token to some experts: rounding can send it to others."""

UNSHARED = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi counts rows
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "stablelm": _SIZES,  # its layers pass no keyword on
    "qwen3_next": {  # every other layer is linear attention
        **_SIZES,
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "hidden_size": 32,
    },
}
"""Models that fall back to one row per completion."""


def tiny_model(name: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Make a random model of an architecture, with weights large enough that mistakes show."""
    specific = {**ARCHITECTURES, **UNSHARED}.get(name, {})
    sizes = (
        _SIZES
        if name not in UNSHARED and not name.startswith("gpt2") and "n_embd" not in changes
        else {k: v for k, v in _SIZES.items() if "token" in k or k == "vocab_size"}
    )
    config = AutoConfig.for_model(name, **{**sizes, **specific, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim > 1 or key.endswith(("bias", "sinks")):
                    parameter.normal_(0, 0.15)
    return model.eval()


def group(
    prompt: int, completions: list[int], *, seed: int = 0, comparisons: tuple[Comparison, ...] = ()
) -> PromptGroup:
    """Make a group of random tokens with these lengths; by default the first completion beats each other one."""
    generator = np.random.default_rng(seed)
    default = tuple(Comparison(0, other, None, other) for other in range(1, len(completions)))
    return PromptGroup(
        generator.integers(3, VOCABULARY, prompt),
        tuple(generator.integers(3, VOCABULARY, length) for length in completions),
        comparisons or default,
    )


def unshared(group: PromptGroup) -> list[PromptGroup]:
    """Return the group as one group per completion, without comparisons: no prompt is shared."""
    return [PromptGroup(group.prompt, (completion,), ()) for completion in group.completions]
