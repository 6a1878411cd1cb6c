"""A model of every type that the installed mlx-lm knows, with random weights.

Its config is made by looking at the type's dataclass. What that says by itself stays,
and what has no default is chosen by its name (`NAMED`) or else by its type. What needs
more is in `OVERRIDES`. Nothing is evaluated, so the weights take no memory.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import pkgutil
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# No round size: no other dimension can be taken for it.
VOCABULARY = 1237
LAYERS = 4
SPECIAL = 6  # tokens at the end of the tiny model's vocabulary that no text has

NAMED: dict[str, Any] = {
    **dict.fromkeys(["num_layers", "n_layers", "n_layer", "num_hidden_layers"], LAYERS),
    **dict.fromkeys(["num_transformer_layers"], LAYERS),
    **dict.fromkeys(["hidden_size", "hidden_dim", "d_model", "n_embd"], 64),
    **dict.fromkeys(["model_dim", "dim_model_base"], 64),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_heads", "n_head"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "rotary_dim", "index_head_dim"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 4096),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["moe_layer_freq", "decoder_sparse_step"], 1),
    "mlp_only_layers": [],
    "no_rope_layers": [],
    **dict.fromkeys(["rope_theta", "swa_rope_theta"], 10000.0),
    **dict.fromkeys(["rope_scaling", "rope_parameters"], None),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "mamba_expand"], 2),
    **dict.fromkeys(["mla_scale_q_lora", "mla_scale_kv_lora"], True),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "state_size"], 32),
    # The defaults of many types are those of a real model.
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], 32),
    **dict.fromkeys(["linear_num_value_heads", "mamba_n_heads"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["linear_num_key_heads"], 2),
    **dict.fromkeys(["mamba_d_head"], 16),
    **dict.fromkeys(["mamba_d_ssm"], 64),
    **dict.fromkeys(["mamba_d_state"], 32),
    "layer_types": ["full_attention"] * LAYERS,
    "time_step_limit": [0.0, 100.0],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
WHOLE = 32  # what is a number, and means nothing to us
WIDTHS = ("vocab_size", "num_vocab", "embedding_size", "vocab_size_per_layer_input")
GQA = {"num_key_value_heads": 4}

WINDOWS = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = dict.fromkeys(["sliding_attention", "full_attention"], ROPE)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA_4 = {**ROPE, "llama_4_scaling_beta": 0.1, **YARN}
LINEAR = {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4}
LINEAR |= {"head_dim": 16, "short_conv_kernel_size": 4}

# What looking at the dataclass does not tell, by type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": WINDOWS},
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "num_key_value_heads": 4},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "dbrx": {
        "ffn_config": {
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}},
    "exaone_moe": {"is_moe_layer": [False, True] * 2, "layer_types": WINDOWS},
    "gemma3n": {
        "layer_types": WINDOWS * 2,
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 4,
        "activation_sparsity_pattern": [0.0] * 8,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
    },
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "sliding_window_pattern": 3,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
    },
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS},
    "hunyuan": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {"layers_block_type": ["mamba", "attention"] * 2},
    "kimi_k3": {
        "linear_attn_config": LINEAR,
        "num_hidden_layers": LAYERS,
        **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32),
        **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 16),
        "attn_res_block_size": 2,
        "routed_expert_hidden_size": 64,
        "moe_intermediate_size": 32,
    },
    "kimi_linear": {"linear_attn_config": LINEAR},
    "lfm2": {"block_dim": 64, "block_ff_dim": 64, "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": {"zero_expert_type": "identity"},
    "longcat_flash_ngram": {"zero_expert_type": "identity"},
    "mamba2": {
        "time_step_rank": 4,
        "n_groups": 1,
        "state_size": 16,
        "num_heads": 4,
        "head_dim": 32,
    },
    "mellum": {"layer_types": WINDOWS, "rope_parameters": ROPES},
    "mimo_v2_flash": {
        "moe_layer_freq": [0, 1, 1, 1],
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "partial_rotary_factor": 1,
    },
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 4096}},
    "ministral3": {"rope_parameters": LLAMA_4},
    "mistral4": {"rope_parameters": LLAMA_4, "rope_scaling": LLAMA_4},
    "muse_spark": {
        "rope_parameters": ROPE,
        "layer_types": WINDOWS,
        "layer_rope_theta": [10000.0] * LAYERS,
        "moe_hidden_size": 64,
        "moe_intermediate_size": 32,
    },
    "nemotron-nas": {
        "num_hidden_layers": LAYERS,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
        ]
        * LAYERS,
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    "openelm": {
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.0] * LAYERS,
    },
    "phimoe": {
        "rope_scaling": {
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        }
    },
    "plamo": {"num_attention_heads": 16},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "lm_head",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
        ],
        "text_config": {"hidden_size": 128, "head_dim": 64},
    },
    "qwen": {"kv_channels": 16},
    "qwen3_5": {"num_experts": 0},
    "qwen3": {"rope_theta": 1e6},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": ROPES, "layer_types": WINDOWS},
    "step3p5": {"num_attention_groups": 2},
}
# Multimodal types: which type the language model inside is of, where that is another.
TEXT_TYPES: dict[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_5",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}


def model_types() -> list[str]:
    """The types of the installed mlx-lm: every module with a model in it."""
    import mlx_lm.models

    found = []
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        spec = info.module_finder.find_spec(info.name, None)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        if "class ModelArgs" in source or "ModelArgs," in source:
            found.append(info.name)
    return sorted(found)


def load_type(model_type: str) -> ModuleType:
    """The module of ``model_type``; ImportError where something is missing for it."""
    try:
        return importlib.import_module(f"mlx_lm.models.{model_type}")
    except SystemExit as e:  # olmo ends the process
        raise ImportError(f"{model_type} wants another package") from e
    except RuntimeError as e:  # bitnet, 0.31.3, builds a Metal kernel
        raise ImportError(str(e)) from e


def _value(field: dataclasses.Field[Any]) -> Any:
    if field.name in NAMED:
        return NAMED[field.name]
    kind = str(getattr(field.type, "__name__", field.type)).lower()
    for word, value in (("bool", False), ("int", WHOLE), ("float", 1.0), ("str", "")):
        if word in kind:
            return value
    return None


def _fill(cls: Any, given: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """A config for the dataclass ``cls``, with ``given`` in it."""
    config: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default, made = field.default, field.default_factory
        required = default is dataclasses.MISSING and made is dataclasses.MISSING
        if field.name in WIDTHS:
            config[field.name] = vocabulary
        elif required or (field.name in NAMED and isinstance(default, int)):
            config[field.name] = _value(field)
    return {**config, **given}


def config_of(model_type: str, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """A config for a small model of that type."""
    args = load_type(model_type).ModelArgs
    given = dict(OVERRIDES.get(model_type, {}), model_type=model_type)
    if "text_config" in {field.name for field in dataclasses.fields(args)}:
        text_type = TEXT_TYPES.get(model_type, model_type)
        inner = load_type(text_type)
        names = ("TextConfig", "TextArgs", "TextModelArgs", "ModelArgs")
        text = next(getattr(inner, name) for name in names if hasattr(inner, name))
        more = dict(OVERRIDES.get(text_type, {}), model_type=text_type)
        more.update(given.get("text_config", {}))
        given["text_config"] = _fill(text, more, vocabulary)
    return _fill(args, given, vocabulary)


def make(config: dict[str, Any]) -> Any:
    """A model with that config, and random weights. Nothing is evaluated."""
    module = load_type(config["model_type"])
    return module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))


def write(
    directory: Path,
    model_type: str,
    base: Path,
    vocabulary: int | None = None,
    seed: int = 3,
) -> Path:
    """A small model of that type, with the tokenizer of the tiny model ``base``.

    Its vocabulary, too, unless another size is given.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, directory / name)
    known = json.loads((base / "config.json").read_bytes())["vocab_size"]
    vocabulary = vocabulary or known
    config = config_of(model_type, vocabulary)
    mx.random.seed(seed)
    weights = {}
    for name, value in tree_flatten(make(config).parameters()):
        if not mx.issubdtype(value.dtype, mx.floating):
            pass
        elif value.ndim < 2 or "norm" in name or "conv" in name:
            value = value.astype(mx.float32)
        else:
            scale = 0.5 if "embed" in name else 0.15
            value = mx.random.normal(value.shape, scale=scale)
            if value.shape[0] == vocabulary:  # no end of the answer by chance
                value[known - SPECIAL : known] = 0.0
        weights[name] = value
    mx.save_safetensors(
        str(directory / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


if __name__ == "__main__":
    # OUT BASE TYPE[:VOCABULARY]...: each in a directory of OUT, called as it is here.
    out, tiny, *wanted = sys.argv[1:]
    for word in wanted:
        kind, _, size = word.partition(":")
        write(Path(out) / word, kind, Path(tiny), int(size) if size else None)
