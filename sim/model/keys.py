"""How published configs spell a router, its experts and its layers: one table of keys, and what a model type implies."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_SPELLINGS = {
    # The router and its experts, in order of preference where a config has several.
    "n_experts": (
        "n_routed_experts num_experts num_local_experts moe_num_experts num_moe_experts num_routed_experts "
        "n_experts moe_num_routed_experts expert_num num_experts_per_layer moe_num_primary_experts"
    ),
    "top_k": (
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts moe_router_topk "
        "n_activated_experts num_activated_experts experts_per_token experts_per_tok num_selected_experts "
        "moe_num_active_experts router_topk num_experts_topk moe_experts_per_token num_selects "
        "moe_num_active_primary_experts"
    ),
    "n_group": "n_group num_expert_group num_expert_groups n_expert_groups moe_router_num_groups n_groups_moe",
    "topk_group": (
        "topk_group num_limited_groups n_limited_groups num_expert_groups_per_tok moe_router_group_topk "
        "topk_groups moe_topk_group"
    ),
    # so many groups, each of which gives a token equally many experts (Intern-S1-Pro)
    "each_group": "router_n_groups",
    "scoring": (
        "scoring_func score_function score_func moe_router_activation_func moe_router_activation "
        "moe_router_score_function router_score_function expert_selection_fn moe_scoring_func "
        "scoring_function router_scoring_func moe_score_func router_score_func expert_gating_func "
        "router_activation router_activation_func routing_score_func gating_func moe_gate_act moe_router_score_func"
    ),
    # true or false
    "sigmoid": "moe_router_use_sigmoid router_use_sigmoid use_sigmoid_routing",
    "softmax": "moe_primary_router_apply_softmax",
    "has_bias": (
        "use_routing_bias use_moe_router_bias moe_router_enable_expert_bias use_expert_bias "
        "moe_use_aux_free use_load_balancing_bias router_enable_expert_bias enable_expert_bias "
        "use_correction_bias use_e_score_correction_bias moe_router_use_correction_bias moe_use_expert_bias "
        "use_aux_free use_aux_loss_free use_router_bias moe_router_use_bias use_router_correction_bias moe_use_correction_bias"
    ),
    "method": "topk_method",
    "n_shared": (
        "n_shared_experts num_shared_experts moe_num_shared_experts num_shared_expert n_shared_expert "
        "expert_shared_count"
    ),
    "n_zero": (
        "zero_expert_num num_zero_experts n_zero_experts num_zero_computation_experts moe_num_zero_experts "
        "num_null_experts n_null_experts num_identity_experts num_copy_experts num_constant_experts "
        "num_skip_experts"
    ),
    "n_hash": "num_hash_layers n_hash_layers num_hash_moe_layers moe_num_hash_layers",
    # Sizes
    "hidden": "hidden_size d_model dim n_embd model_dim",
    "latent": "routed_expert_hidden_size moe_latent_size moe_hidden_size moe_latent_dim",
    "width": (
        "moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size expert_hidden_dim moe_inter_dim "
        "expert_intermediate_size moe_intermediate_dim expert_intermediate_dim expert_hidden_size "
        "moe_hidden_dim expert_dim expert_ffn_dim expert_inner_dim moe_expert_inner_dim moe_inter_size"
    ),
    # of an expert where there is no other
    "any_width": "ffn_hidden_size intermediate_size hidden_dim inter_dim n_inner d_ff decoder_ffn_dim",
    "shared_width": (
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size share_expert_dim "
        "share_expert_dims shared_intermediate_size shared_experts_intermediate_size"
    ),
    "activation": (
        "mlp_hidden_act moe_hidden_act expert_hidden_act expert_activation moe_activation hidden_act "
        "hidden_activation activation_function dense_act_fn activation ffn_act_fn"
    ),
    # Type of the weights
    "expert_dtype": "expert_dtype",
    "quantization": "quantization_config compression_config quantization",
    "dtype": "dtype torch_dtype",
    "gated": (
        "gated_linear_unit use_gated_mlp gated_mlp is_gated_mlp moe_gated is_gated use_glu swiglu mlp_gated "
        "expert_gated gated_experts moe_use_gated_mlp"
    ),
    # The decoder's layers, and which of them are MoE
    "layers": "num_decoder_layers decoder_layers num_hidden_layers n_layers num_layers n_layer",
    # layers of multi-token prediction, behind the decoder's
    "drafts": "num_nextn_predict_layers num_mtp_layers mtp_num_layers num_mtp_modules mtp_num_hidden_layers",
    # so many leading layers are dense
    "dense_first": (
        "first_k_dense_replace num_dense_layers n_dense_layers moe_layer_num_skipped dense_mlp_idx "
        "num_first_dense_layers first_num_dense_layers n_first_dense_layers num_leading_dense_layers first_k_dense "
        "leading_dense_block_count first_k_dense_layers moe_first_k_dense_replace num_skip_moe_layers moe_first_dense"
    ),
    # layer % n == 0 (DeepSeek, Megatron), or a 0 or 1 for each layer
    "every": "moe_layer_freq route_every_n moe_every_n_layer",
    # (layer + 1) % n == 0 (Qwen, Llama 4, Arctic, ERNIE), or a 0 or 1 for each layer
    "step": (
        "decoder_sparse_step interleave_moe_layer_step moe_layer_frequency moe_layer_interval "
        "moe_layer_step moe_interval expert_interval moe_expert_interval moe_every_n_layers moe_every_k_layers"
    ),
    # layer % period == offset (Jamba)
    "period": "expert_layer_period moe_layer_period",
    "offset": "expert_layer_offset moe_layer_offset",
    # first and last MoE layer (ERNIE)
    "start": "moe_layer_start_index moe_start_layer_index moe_layer_start moe_start_layer",
    # -1: the last layer of all
    "end": "moe_layer_end_index moe_end_layer_index moe_layer_end",
    # layer numbers, as a list or as text, or true or false for each layer
    "moe_ids": (
        "moe_layers moe_layers_enum moe_layer_ids moe_layer_indices moe_layers_idx moe_layer_idx "
        "moe_layers_indices moe_layer_list sparse_layers expert_layers moe_block_ids moe_layers_list "
        "is_moe_layer moe_layer_layout moe_layer_mask"
    ),
    "dense_ids": (
        "mlp_only_layers dense_layers dense_layer_ids dense_layer_indices dense_layers_idx dense_layer_idx "
        "skip_moe_layers moe_skip_layers non_moe_layers dense_mlp_layers"
    ),
    # a word for each layer (other keys, too, where a word is of MoE); lists that only name kinds of attention say nothing
    "types": (
        "mlp_layer_types ffn_layer_types mlp_types ffn_types layers_block_type layer_block_types "
        "block_types layers_type layer_types feed_forward_types"
    ),
    # a letter for each layer: E is MoE (Nemotron-H)
    "pattern": "hybrid_override_pattern hybrid_layer_pattern moe_layer_pattern layers_pattern layer_pattern",
    # an object for each layer (Nemotron puzzle, AnyModel)
    "blocks": "block_configs",
    # false: no experts after all
    "switch": "use_moe is_moe enable_moe enable_moe_block moe_enabled",
    # Understood, and of no weight here: a bias of the router's linear layer is part of the logits.
    "logit_bias": "router_bias add_router_bias",
}
KEYS = {field: tuple(spellings.split()) for field, spellings in _SPELLINGS.items()}
LAYER_FIELDS = tuple("dense_first every step period start end moe_ids dense_ids types pattern blocks".split())
PER_LAYER = re.compile(
    r"experts?_per_layer$|^experts_in_layers?$|(^|_)layers?_(num_?|n_)?experts?(_counts?)?$|^moe_num_experts_list$"
)
"""Counts of experts that differ from layer to layer (pruned models)."""


class Type(NamedTuple):
    """What the code and the config class of a model type imply where a config.json leaves it out."""

    scoring: str = "softmax"
    has_bias: bool = False
    layers: Mapping[str, Any] = MappingProxyType({})
    groups: tuple[int, int] = (1, 1)
    matrices: int = 3
    n_zero: int = 0
    n_shared: int = 0
    of_each_group: bool = False
    top_k: int | None = None
    caveat: str = ""


# transformers 5.24.0 (configuration_*.py and modeling_*.py of each type); vLLM 0.33.0 for alice_ai, arctic, bailing_moe,
# grok, interns*, k2_horizon, kimi_k2, longcat_flash_ngram, mimo_v2, minicpm, nomic_bert, pangu*, param2moe,
# step3 and step5; SGLang 0.5.23 for the groups of bailing_moe_v2, gigachat3_5, llada2_moe, sdar_moe, xllm and xverse;
# vllm-ascend 0.9.1 for pangupromoe (one expert of each of 8 groups); mlx-lm 0.32.2 for klear; llama.cpp for smallthinker.
_ENCODER = "its encoder has MoE layers of its own, which are not counted"
_RULES = (
    (Type("sigmoid", True, {"first_k_dense_replace": 3}, (8, 4)), "deepseek_v3 deepseek_v32 dots_vlm kimi_k2 beam"),
    (Type("sigmoid", True, {"first_k_dense_replace": 2}, (8, 4)), "bailing_hybrid"),
    (Type("sigmoid", True, {"first_k_dense_replace": 1}, (8, 4)), "axk1 bailing_moe_v3"),
    (Type("sigmoid", True, {}, (8, 4)), "bailing_moe_v2 bailing_moe_v2_5 bailing_moe_linear bailing_moe_linear_v2"),
    (Type("sigmoid", True, {"first_k_dense_replace": 3}), "glm5_next glm_moe_dsa step3p5 step3p7"),
    (
        Type("sigmoid", True, {"first_k_dense_replace": 1}),
        "afmoe axk2 dots3_note exaone_moe glm4_moe glm4_moe_lite glm4v_moe hy_v3 hy_v4 hy_v4_vl kimi_linear laguna mimo_v2_flash "
        "param2moe sarvam_mla sarvam_moe",
    ),
    (Type("sigmoid", True, {"num_dense_layers": 2}), "lfm2_moe"),
    (
        Type("sigmoid", True),
        "alice_ai dots1 gigachat3_5 inkling inkling2 inkling2_loop k2_horizon klear kolibri1 llada2_moe mimo_v2 minimax_m2 "
        "minimax_m3 minimax_m3_vl muse_spark solar_open xllm",
    ),
    (Type("sigmoid", True, {"layers_block_type": None}, matrices=2), "nemotron_h"),  # the file must say
    (Type("sigmoid", False), "flint pangupromoev2 pangu_ultra_moe smallthinker"),
    (Type("sigmoid", False, {"first_k_dense_replace": 1}), "step5"),
    (Type("sigmoid", False, n_shared=1), "llama4"),
    (Type("sqrtsoftplus", True, {"num_hash_layers": 3}), "deepseek_v4"),
    (Type("sqrtsoftplus", True), "deepseek_v41"),
    (Type("softmax", True, {"moe_layer_start_index": 1}), "ernie4_5_moe ernie4_5_moe_vl ernie4_5_vl_moe"),
    (Type("softmax", True, n_zero=256), "longcat_flash longcat_flash_ngram"),
    (Type("softmax", True, n_zero=1), "zaya"),
    (Type("sparsemixer"), "phimoe"),
    (Type(layers={"expert_layer_period": 2, "expert_layer_offset": 1}), "jamba"),
    (Type(layers={"moe_layer_frequency": 2}), "arctic"),
    (Type(layers={"moe_layers_enum": list(range(4, 60))}), "step3"),
    (Type(layers={"first_k_dense_replace": 1}), "mistral_large4 unlimited_ocr"),
    (Type(matrices=2), "nomic_bert"),
    (Type(layers={"decoder_sparse_step": 4}, matrices=2, top_k=1, caveat=_ENCODER), "switch_transformers"),
    (Type(layers={"decoder_sparse_step": 4}, matrices=2, top_k=2, caveat=_ENCODER), "nllb_moe"),
    (Type(of_each_group=True), "pangupromoe"),
    (Type(caveat="its attention is routed to experts of its own, which is not modelled"), "jetmoe"),
    (
        Type(caveat="its layers share a few banks of experts: memory and maps are of the banks, not of layers"),
        "interns2_mobius",
    ),
    (
        Type(),
        "aria aria_moe_lm bailing_moe cohere2_moe dbrx deepseek deepseek_ocr2 deepseek_v2 deepseek_vl_v2 diffusion_gemma doge "
        "flex_olmo gemma4 gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared grok_1 grove_moe hunyuan "
        "hunyuan_image_3_moe hunyuan_moe_v1 hunyuan_v1_moe interns1_pro iquest_q1 lara_mini mellum minicpm minimax minimax_m1 "
        "minimax_text_01 mistral mistral4 mixtral olmoe openai_privacy_filter qwen2_moe qwen3_5_moe qwen3_moe qwen3_next "
        "qwen3_omni_moe qwen3_vl_moe qwen4_exp sdar_moe xverse",
    ),
)
TYPES = {name: rule for rule, names in _RULES for name in names.split()}
WIDTH_OF_ALL = frozenset(
    "arctic aria aria_moe_lm cohere2_moe dbrx doge flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared "
    "grok_1 hunyuan hunyuan_v1_moe hunyuan_moe_v1 hunyuan_image_3_moe jamba jetmoe llama4 minicpm minimax minimax_m1 minimax_m2 "
    "minimax_m3 minimax_m3_vl minimax_text_01 mistral mixtral nllb_moe nomic_bert olmoe openai_privacy_filter phimoe "
    "switch_transformers xverse zaya".split()
)
"""Types whose experts have the `intermediate_size` of the config."""
_SQUEEZED = {name.replace("_", ""): name for name in TYPES}
_ENDING = re.compile(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel|Model)$")


def type_of(config: dict[str, Any]) -> tuple[str, Type | None]:
    """Name and rules of a config's model type; by its architecture where it names no known type."""
    told, architectures = str(config.get("model_type") or "").lower().replace("-", "_"), config.get("architectures")
    named = architectures[:1] if isinstance(architectures, list) else []
    for name in (told, *(name for name in named if isinstance(name, str))):
        own = re.sub("[-_]", "", _ENDING.sub("", name).lower())
        for known in (own, re.sub("(text|thinker)$", "", own), re.sub("(vl)?(text|thinker)?$", "", own)):
            if known in _SQUEEZED:
                return _SQUEEZED[known], TYPES[_SQUEEZED[known]]
    if not told and not named and "n_activated_experts" in config:  # DeepSeek's own inference code
        by_score = {"sigmoid": "deepseek_v3", "sqrtsoftplus": "deepseek_v4"}
        told = by_score.get(str(config.get("score_func")), "deepseek_v2")
    return told, TYPES.get(told)


_SPEAKS = re.compile(
    r"moe|expert|rout(e|er|ing|ed)(_|$)|dense|sparse|mlp_only|(mlp|ffn|feed_forward)_(layer|type|pattern)|hybrid_override"
    r"|block_configs"
)
# About training, kernels, precision, shared experts, draft layers, attention and vision: they do not change which expert
# a token takes.
_HARMLESS = (
    r"loss|coef|sliding|window|dtype|jitter|softcap|scal(e|ing)|norm|logits|eps(ilon)?$|(^|_)init|attention|attn|indexer|mtp|vision"
    r"|draft|shared?_(expert|moe)|plan$|_lr|update_rate|balanc|pre_softmax|encoder|\dlayer"
)
_MORE_HARMLESS = (
    r"|capacity|drop|impl|backend|quant|parallel|fus(e|ed|ion)|kernel|overlap|dispatch|permut|gemm|fp32|fp8|swiglu|clamp"
    r"|compress|cache|rope|aux(?!_?free)|noise|temperature|grad|combin|ep_size|debug|sink|(?<!group)_size$|_dims?$|weight|zero_expert_type"
    r"|sparse_(topk|local|window|mode|num)|^use_mixed_mlp_moe$|^residual_moe$|^moe_gate$"
)
_OF_LAYERS = re.compile(
    r"layer|block|freq|interval|period|every|(^|_)step|skip|stride|offset|first|last|only|pattern|mask|(^|_)ids?$|ind(ex|ices)"
)
_HARMLESS_OF_LAYERS, _HARMLESS_OF_OTHERS = re.compile(_HARMLESS), re.compile(_HARMLESS + _MORE_HARMLESS)
MOE_WORD = re.compile(r"(^|[^a-z])(moe|experts?)([^a-z]|$)", re.IGNORECASE)
_OF_WORDS = re.compile(r"layer|block|type|kind|layout|pattern|spec")
_MOST_WORDS = 10_000


def of_layers(key: str) -> bool:
    """Whether a key may say which layers are MoE."""
    return bool(_OF_LAYERS.search(key.lower()))


def says_moe(value: Any) -> bool:
    """Whether a list, of a word or an object for each layer, has a word of MoE."""
    items = value[:_MOST_WORDS] if isinstance(value, list) else []
    words = (word for item in items for word in (item.values() if isinstance(item, dict) else (item,)))
    return any(isinstance(word, str) and bool(MOE_WORD.search(word)) for word in words)


def speaks(key: str, value: Any) -> bool:
    """Whether a key speaks of MoE, experts, routing, sparse or dense layers, and is not switched off."""
    name = key.lower()
    harmless = _HARMLESS_OF_LAYERS if "layer" in name or "block" in name else _HARMLESS_OF_OTHERS
    if harmless.search(name) or value in (None, False, 0, "", [], {}):
        return False
    return bool(_SPEAKS.search(name)) or (_OF_WORDS.search(name) is not None and says_moe(value))
