# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every family in transformers' causal-LM table, and what razor attention does with it.

Sizes are set by the names that configurations give them; what is left over stands in OF_FAMILY. Kinds of layers stay
those of the family's defaults, each at least once, so that a family that slides by default slides here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from razor_attention import FULL, Plan, RazorCache, attach
from razor_attention.hf.models import Geometry, geometry
from razor_attention.hf.names import output_cache
from tiny_models import EOS, PAD, prompts, settle

VOCABULARY = 112  # prompts stay below 96: what is above is for tokens of images and the like
MOST_PARAMETERS = 20_000_000
LENGTHS, NEW = (30, 22), 10
CLOSE = 2e-3  # logits have a deviation of about 3

HIDDEN, HEADS, KV_HEADS, LAYERS, HEAD_DIM, INNER, EXPERTS = 64, 4, 2, 2, 16, 64, 4
# size: what configurations call it.
_NAMES: list[tuple[int, tuple[str, ...]]] = [
    (VOCABULARY, ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")),
    (
        HIDDEN,
        (
            *("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "dim_model", "word_embed_proj_dim"),
            *("embedding_size", "input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width"),
            *(
                "out_hidden_size",
                "projection_dim",
                "backbone_hidden_size",
                "projector_input_dim",
                "projector_output_dim",
            ),
        ),
    ),
    (
        HEADS,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
            *("swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads", "linear_num_key_heads"),
            *("conf_num_attention_heads", "index_n_heads"),
        ),
    ),
    (
        KV_HEADS,
        (
            *(
                "num_key_value_heads",
                "num_kv_heads",
                "swa_num_key_value_heads",
                "num_query_groups",
                "num_experts_per_tok",
            ),
            *("num_experts_per_token", "moe_topk", "moe_k", "moe_num_experts_per_tok", "num_experts_per_layer"),
        ),
    ),
    (
        LAYERS,
        (
            *(
                "num_hidden_layers",
                "n_layer",
                "n_layers",
                "num_layers",
                "decoder_layers",
                "encoder_layers",
                "num_blocks",
            ),
            *("num_decoder_layers", "num_encoder_layers", "conf_num_hidden_layers", "depth", "num_global_layers"),
        ),
    ),
    (
        HEAD_DIM,
        (
            *("head_dim", "kv_channels", "d_kv", "dim_head", "attention_head_size", "d_head", "swa_head_dim"),
            *(
                "linear_key_head_dim",
                "linear_value_head_dim",
                "linear_head_dim",
                "qk_rope_head_dim",
                "qk_nope_head_dim",
            ),
            *("v_head_dim", "kv_lora_rank", "q_lora_rank", "index_head_dim", "attention_head_dim"),
            *("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank", "o_lora_rank"),
            *("hidden_size_per_layer_input", "laurel_rank", "hc_lowrank", "rotary_dim", "d_rel", "rel_extent"),
            *("chunk_size", "mamba_chunk_size", "global_head_dim", "adapter_rank", "router_hidden_size", "index_topk"),
            *(
                "lsh_attn_chunk_length",
                "local_attn_chunk_length",
                "attention_chunk_size",
                "local_attention",
                "window_size",
            ),
            *("attention_window_size", "sliding_window_size", "loop_gate_rank", "gated_norm_rank"),
        ),
    ),
    (
        INNER,
        (
            *("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "n_inner"),
            *("encoder_ffn_dim", "shared_expert_intermediate_size", "d_inner", "dim_ff", "dff", "d_ff", "mlp_dim"),
            *("expert_ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"),
            *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "feed_forward_size"),
        ),
    ),
    (
        EXPERTS,
        (
            *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_codebooks"),
            *("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
        ),
    ),
    (2 * HEAD_DIM, ("qk_head_dim",)),
    (1, ("n_group", "topk_group", "n_groups", "mamba_n_groups", "num_expert_group", "mamba_ngroups", "o_groups")),
]
_SIZES = {name: size for size, names in _NAMES for name in names}
_LAYERS = {name for size, names in _NAMES if "num_hidden_layers" in names for name in names}
_UNSET = (
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
)  # where None makes the class fail
_EMBEDDINGS = ("wte.weight", "wpe.weight")  # `settle` knows others
_AFTER_GELU = ("mlp.c_proj.weight", "output.dense.weight", "fc2.weight")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_PAIRS = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_ZAMBA = _PAIRS | {"attention_hidden_size": 128, "attention_head_dim": 32}  # twice the hidden size
_LAST_LAYER = {1: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2 * HEAD_DIM}}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
_INDEXER |= {"indexer_compress_ratio": 4}
_NO_DEFAULTS = ("gemma4_assistant",)  # the class refuses its own
OF_FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": HIDDEN},
        "decoder_config": {"hidden_size_global": HIDDEN},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "dory": {  # counts attention and mlp as layers of their own
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
        **{"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        "text_config": {"per_layer_config": _LAST_LAYER},
    },
    "dots3_note_text": {"per_layer_config": _LAST_LAYER},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [INNER] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "expand": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"concat_input": False},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": _ZAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": _ZAMBA | {"hybrid_layer_ids": [1, 3], "n_mamba_heads": 8, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


class TooLarge(Exception):
    """A model that is not tiny; the number of its parameters."""


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What makes a configuration like this one tiny, for its own class.

    Args:
        config: with the defaults of its class, or what a model around it gives its part.
    """
    given = {key: value for key, value in config.to_dict().items() if key not in config.sub_configs}
    sizes: dict[str, Any] = {key: size for key, size in _SIZES.items() if isinstance(given.get(key), int | list)}
    sizes |= {key: _SIZES[key] for key in _UNSET if key in given}
    for key in sizes:
        if isinstance(given[key], list):
            sizes[key] = [sizes[key]] * LAYERS
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = HEADS
    layers = LAYERS
    for key in _KINDS:
        if isinstance(given.get(key), list):
            kinds = list(dict.fromkeys(given[key]))
            layers = max(layers, len(kinds))
            sizes[key] = kinds
    for key in _KINDS:
        if key in sizes:
            sizes[key] = (sizes[key] * layers)[:layers]
    sizes |= dict.fromkeys(_LAYERS & sizes.keys(), layers)
    window, longest = given.get("sliding_window"), given.get("max_position_embeddings")
    if isinstance(window, int) and (longest is None or window < longest):
        sizes["sliding_window"] = 16
    special = [key for key in given if key.endswith(("_token_id", "_token_index"))]
    sizes |= {key: 100 + i % 12 for i, key in enumerate(special) if isinstance(given[key], int) and given[key] > 95}
    sizes |= {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": EOS}
    sizes |= {key: None for key in ("forced_eos_token_id", "forced_bos_token_id") if key in given}
    if "tie_word_embeddings" in given:
        sizes["tie_word_embeddings"] = False  # else a token's own row answers with that token
    if given.get("is_decoder") is False:
        sizes["is_decoder"] = True
    sizes |= {name: sizes_of(getattr(config, name)) for name in config.sub_configs if getattr(config, name, None)}
    return sizes


def merge(sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sizes with changes, part by part."""
    both = sizes | changes
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(sizes.get(key), dict):
            both[key] = merge(sizes[key], value)
    return both


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model of a family."""
    changes = OF_FAMILY.get(name, {})
    defaults = AutoConfig.for_model(name, **(changes if name in _NO_DEFAULTS else {}))
    return AutoConfig.for_model(name, **merge(sizes_of(defaults), changes))


def tiny_family(name: str) -> PreTrainedModel:
    """A tiny random model of a family, whose answers are clear.

    Raises:
        TooLarge: 21000000 parameters
    """
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(tiny_config(name)).parameters()
    if (parameters := sum(weight.numel() for weight in weights)) > MOST_PARAMETERS:
        raise TooLarge(f"{parameters} parameters")
    model = settle(AutoModelForCausalLM.from_config(tiny_config(name)))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() == 2 and path.endswith(_AFTER_GELU):
                weight.mul_(0.25)  # what GELU adds to every token alike would decide all answers
            elif path.endswith("LayerNorm.weight"):  # `settle` knows them in small letters
                weight.mul_(0.3).add_(1.0)
            elif path.endswith(_EMBEDDINGS):
                weight.mul_(weight.shape[1] ** 0.5)
    model.generation_config.suppress_tokens = [PAD, EOS, *range(96, VOCABULARY)]
    return model


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Any:
    """Greedy answer of NEW tokens: `sequences`, `logits` by step, and the cache."""
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **options)


def door(model: PreTrainedModel) -> Geometry:
    """Everything that may refuse a model before it says a word; its sizes, if nothing does."""
    sizes = geometry(model.config)
    plan = Plan.full(sizes.num_layers, sizes.num_kv_heads)
    RazorCache(model.config, plan)
    with attach(model, plan):
        return sizes


def compressed(sizes: Geometry) -> Plan:
    """Heads with a window and the compensation row, and the first of each odd layer full."""
    plan = Plan.streaming(sizes.num_layers, sizes.num_kv_heads, 2, 8)
    window = plan.window_size.clone()
    window[1::2, 0] = FULL
    return Plan(plan.sink_size, window, torch.ones_like(plan.compensate))


def drift(one: Any, other: Any, row: int, at: int | None = None) -> float:
    """Largest difference of logits between a row of two answers, as long as the tokens before them are the same.

    Args:
        one, other: what `generate` gave.
        row: of one.
        at: row of other; None: the same.
    """
    at, worst = row if at is None else at, 0.0
    for step in range(NEW):
        ours, theirs = one.logits[step][row], other.logits[step][at]
        worst = max(worst, float((ours - theirs).abs().max()))
        if one.sequences[row, step - NEW] != other.sequences[at, step - NEW]:
            break
    return worst


def refusal(config: PreTrainedConfig) -> str | None:
    """In what words a configuration alone is refused; None: it is not."""
    try:
        geometry(config)
    except NotImplementedError as error:
        return str(error)
    return None


@torch.no_grad()
def outcome(name: str) -> list[str]:
    """What razor attention does with a family: ["equal"], ["refused", message] or ["not buildable tiny", reason].

    Raises:
        AssertionError: it answers otherwise than it should.
    """
    torch.manual_seed(0)
    ids, mask = prompts(*LENGTHS)
    alone = [(ids[[row], -length:], mask[[row], -length:]) for row, length in enumerate(LENGTHS)]
    try:
        config = tiny_config(name)
    except Exception as error:
        return ["not buildable tiny", f"{type(error).__name__}: {error}"]
    try:
        model = tiny_family(name)
        stock, stock_alone = generate(model, ids, mask), [generate(model, *prompt) for prompt in alone]
    except Exception as error:  # transformers' own; the door may still say why
        words = refusal(config)
        reason = str(error) if isinstance(error, TooLarge) else f"{type(error).__name__}: {error}"
        return ["not buildable tiny", reason] if words is None else ["refused", words]
    try:
        sizes = door(model)
    except NotImplementedError as error:
        return ["refused", str(error)]

    plan = Plan.full(sizes.num_layers, sizes.num_kv_heads)
    with attach(model, plan):
        full = generate(model, ids, mask)
    assert len(stock.sequences[:, -NEW:].unique()) > 1, f"{name}: a stock answer of one token says nothing"
    assert torch.equal(full.sequences, stock.sequences), f"{name}: other tokens than stock"
    for row in range(len(LENGTHS)):
        assert drift(full, stock, row) < CLOSE, f"{name}: other logits than stock"
    check_bytes(full, plan, sizes)
    plan = compressed(sizes)
    with attach(model, plan):
        ours, ours_alone = generate(model, ids, mask), [generate(model, *prompt) for prompt in alone]
    check_bytes(ours, plan, sizes)
    for row in range(len(LENGTHS)):
        other, at = ours_alone[row], 0
        if drift(stock, stock_alone[row], row, 0) > CLOSE:  # positions count padding: keep it, change the other row
            changed = prompts(*LENGTHS, seed=1)[0]
            changed[row] = ids[row]
            with attach(model, plan):
                other, at = generate(model, changed, mask), row
        gap = drift(ours, other, row, at)
        assert gap < CLOSE, f"{name}: row {row} depends on the other by {gap}"
    return ["equal"]


def check_bytes(out: Any, plan: Plan, sizes: Geometry) -> None:
    """That the cache of an answer has the bytes that its plan says."""
    lengths = [length + NEW - 1 for length in LENGTHS]  # the last token is not stored
    expected = sum(plan.kv_bytes(length, head_dim=sizes.head_dim, dtype=torch.float32) for length in lengths)
    assert output_cache(out).nbytes == expected, f"expected {expected} bytes, got {output_cache(out).nbytes}"
