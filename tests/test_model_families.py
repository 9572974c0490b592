"""Published configs: for each family one that is written with the family's own keys gives what the preset says."""

import pytest
from conftest import load_config

from sim import load_model, model_names

FIELDS = (
    *("n_experts", "top_k", "n_group", "topk_group", "scoring", "has_bias", "n_layers", "moe_layer_ids", "hidden_size"),
    *("expert_hidden_size", "moe_intermediate_size", "expert_matrices", "n_shared_experts"),
)


def first(m):
    """Number of leading dense layers."""
    return m.moe_layer_ids[0]


def flags(m):
    return [int(layer in m.moe_layer_ids) for layer in range(m.n_layers)]


def mlp_types(m):
    return ["sparse" if flag else "dense" for flag in flags(m)]


def sizes(m, **more):
    return {
        "hidden_size": m.hidden_size, "intermediate_size": 4 * m.hidden_size, "num_hidden_layers": m.n_layers,
        "moe_intermediate_size": m.moe_intermediate_size, "hidden_act": "silu", "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    } | more  # fmt: skip


def deepseek(kind, **more):
    return lambda m: sizes(
        m, model_type=kind, n_routed_experts=m.n_experts, n_shared_experts=m.n_shared_experts,
        num_experts_per_tok=m.top_k, n_group=m.n_group, topk_group=m.topk_group, first_k_dense_replace=first(m),
        moe_layer_freq=1, scoring_func=m.scoring, topk_method="noaux_tc" if m.has_bias else "group_limited_greedy",
        **more,
    )  # fmt: skip


def deepseek_v4(m):
    config = deepseek("deepseek_v4", num_hash_layers=3, expert_dtype="fp4", num_nextn_predict_layers=1)(m)
    return {
        key: config[key]
        for key in config
        if key not in ("n_group", "topk_group", "first_k_dense_replace", "moe_layer_freq")
    }


def deepseek_v41(m):
    return {
        "model_type": "deepseek_v41",
        "text_config": deepseek_v4(m) | {"model_type": "deepseek_v41_text", "num_hash_layers": 0},
    }


def kimi(kind, **more):  # Kimi-Linear's keys; Kimi-K3 nests them
    return lambda m: sizes(
        m, model_type=kind, num_experts=m.n_experts, num_experts_per_token=m.top_k,
        num_shared_experts=m.n_shared_experts, num_expert_group=m.n_group, topk_group=m.topk_group,
        moe_router_activation_func=m.scoring, moe_renormalize=True, first_k_dense_replace=first(m), moe_layer_freq=1,
        use_grouped_topk=True, **more,
    )  # fmt: skip


def kimi_k3(m):
    return {
        "model_type": "kimi_k3",
        "vision_config": {"hidden_size": 1024, "num_experts": 4},
        "text_config": kimi("kimi_linear", topk_method="noaux_tc", routed_expert_hidden_size=m.expert_hidden_size)(m),
    }


def bailing(kind):
    return lambda m: sizes(
        m, model_type=kind, num_experts=m.n_experts, num_experts_per_tok=m.top_k, num_shared_experts=m.n_shared_experts,
        n_group=m.n_group, topk_group=m.topk_group, first_k_dense_replace=first(m), score_function="sigmoid",
        moe_router_enable_expert_bias=True, moe_shared_expert_intermediate_size=512, router_dtype="fp32",
    )  # fmt: skip


def glm(kind, **more):  # no scoring and no method in the file
    def build(m):
        config = deepseek(kind, **more)(m)
        return {
            key: value for key, value in config.items() if key not in ("scoring_func", "topk_method", "moe_layer_freq")
        }

    return build


def by_types(kind, **more):
    def build(m):
        config = glm(kind, mlp_layer_types=mlp_types(m), **more)(m)
        return {key: value for key, value in config.items() if key != "first_k_dense_replace"}

    return build


def nested(key, build, kind):
    return lambda m: {"model_type": kind, "vision_config": {"num_hidden_layers": 27}, key: build(m)}


def qwen(kind, **more):
    return lambda m: sizes(
        m, model_type=kind, num_experts=m.n_experts, num_experts_per_tok=m.top_k, decoder_sparse_step=1,
        mlp_only_layers=[], output_router_logits=False, router_aux_loss_coef=0.001,
        **{"shared_expert_intermediate_size": 512} if m.n_shared_experts else {}, **more,
    )  # fmt: skip


def local_experts(kind, **more):
    def build(m):
        config = sizes(m, model_type=kind, num_local_experts=m.n_experts, num_experts_per_tok=m.top_k, **more)
        return config | {"intermediate_size": config.pop("moe_intermediate_size"), "router_jitter_noise": 0.01}

    return build


def llama4(m):
    text = local_experts(
        "llama4_text", interleave_moe_layer_step=m.n_layers // m.n_moe_layers, intermediate_size_mlp=16384
    )(m)
    return {"model_type": "llama4", "text_config": text}


def minimax_m3(m):
    text = local_experts("minimax_m3_vl_text", moe_layer_freq=flags(m), scoring_func="sigmoid", use_routing_bias=True)(
        m
    )
    return {
        "model_type": "minimax_m3_vl",
        "text_config": text | {"dense_intermediate_size": 12288, "n_shared_experts": m.n_shared_experts},
    }


def hunyuan(m):
    every = m.n_layers
    return sizes(
        m, model_type="hunyuan_v1_moe", num_experts=m.n_experts, moe_topk=[m.top_k] * every,
        num_shared_expert=[1] * every, moe_intermediate_size=[m.moe_intermediate_size] * every, moe_layer_num_skipped=0,
        use_mixed_mlp_moe=True, moe_drop_tokens=False,
    )  # fmt: skip


def ernie(m):
    return sizes(
        m, model_type="ernie4_5_moe", moe_num_experts=m.n_experts, moe_k=m.top_k,
        moe_num_shared_experts=m.n_shared_experts, moe_layer_start_index=first(m), moe_layer_end_index=m.n_layers - 1,
        moe_layer_interval=1, moe_use_aux_free=True, moe_gate="topk", moe_capacity=[64, 64, 64],
    )  # fmt: skip


def longcat(m):
    return {
        "model_type": "longcat_flash", "hidden_size": m.hidden_size, "ffn_hidden_size": 12288,
        "expert_ffn_hidden_size": m.moe_intermediate_size, "num_layers": m.n_layers, "n_routed_experts": m.n_experts,
        "moe_topk": m.top_k, "zero_expert_num": 256, "zero_expert_type": "identity", "router_bias": False,
    }  # fmt: skip


def nemotron(m):
    config = glm("nemotron_h", mlp_hidden_act="relu2", n_groups=8)(m) | {"hidden_act": None}
    if m.expert_hidden_size != m.hidden_size:
        config["moe_latent_size"] = m.expert_hidden_size
    layers = m.n_layers or m.n_moe_layers
    kinds = ["moe" if i in m.moe_layer_ids else "linear_attention" for i in range(layers)]
    del config["first_k_dense_replace"], config["num_hidden_layers"]
    return config | {"layers_block_type": kinds, "mtp_layers_block_type": ["full_attention", "moe"]}


def step_3(m):
    text = sizes(m, moe_num_experts=m.n_experts, moe_top_k=m.top_k, share_expert_dim=5120)
    text |= {"model_type": "step3_text", "moe_layers_enum": ",".join(map(str, m.moe_layer_ids))}
    return {"model_type": "step3_vl", "text_config": text}


def step_37(m):
    text = sizes(m, moe_num_experts=m.n_experts, moe_top_k=m.top_k, share_expert_dim=1280)
    text |= {"model_type": "step3p5", "moe_layers_enum": [*m.moe_layer_ids, 45, 46, 47], "num_nextn_predict_layers": 3}
    text |= {"moe_router_activation": "sigmoid", "use_moe_router_bias": True, "moe_router_scaling_factor": 3.0}
    return {"model_type": "step3p7", "text_config": text}


def mistral(m):  # params.json
    return {
        "dim": m.hidden_size, "n_layers": m.n_layers, "hidden_dim": 4 * m.hidden_size, "activation": "silu",
        "model_type": "mistral_large_3",
        "moe": {
            "num_experts": m.n_experts, "num_experts_per_tok": m.top_k, "num_shared_experts": m.n_shared_experts,
            "expert_hidden_dim": m.moe_intermediate_size, "first_k_dense_replace": first(m), "route_every_n": 1,
            "routed_scale": 1.0, "num_expert_groups": 1, "num_expert_groups_per_tok": 1,
            "use_load_balancing_bias": False,
        },
    }  # fmt: skip


def mimo(m):
    config = deepseek("mimo_v2_flash", hybrid_layer_pattern=[0, 1] * 24)(m)
    return config | {"moe_layer_freq": flags(m), "first_k_dense_replace": None}


V3 = deepseek(
    "deepseek_v3", num_nextn_predict_layers=1, ep_size=1, aux_loss_alpha=0.001,
    quantization_config={"quant_method": "fp8"},
)  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("deepseek-v2", "deepseek-v2.5"), deepseek("deepseek_v2")),
    "deepseek-v2-lite": lambda m: deepseek("deepseek_v2")(m) | {"topk_method": "greedy", "n_group": 1},
    **dict.fromkeys(("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "kimi-k2"), V3),
    "deepseek-v3.2": deepseek("deepseek_v32", index_topk=2048),
    **dict.fromkeys(("deepseek-v4-flash", "deepseek-v4-pro"), deepseek_v4),
    "deepseek-v4.1-flash": deepseek_v41,
    "kimi-k2.5": nested("text_config", V3, "kimi_k25"),
    "kimi-k3": kimi_k3,
    "kimi-linear-48b-a3b": kimi("kimi_linear"),
    **dict.fromkeys(("ling-mini-2.0", "ling-flash-2.0", "ling-1t"), bailing("bailing_moe_v2")),
    "ling-3.0-flash": kimi("bailing_hybrid"),
    **dict.fromkeys(("glm-4.5", "glm-4.5-air", "glm-4.6", "glm-4.7"), glm("glm4_moe")),
    "glm-4.7-flash": by_types("glm4_moe_lite"),
    "glm-5": by_types("glm_moe_dsa", moe_router_dtype="float32", index_topk_freq=4),
    "glm-5.3-flash": nested("text_config", by_types("glm5_next_text"), "glm5_next"),
    **dict.fromkeys(("qwen3-30b-a3b", "qwen3-235b-a22b", "qwen3-coder-480b-a35b"), qwen("qwen3_moe")),
    "qwen3-next-80b-a3b": qwen("qwen3_next", layer_types=["linear_attention", "full_attention"] * 24),
    **dict.fromkeys(
        ("qwen3.5-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b"),
        nested("text_config", qwen("qwen3_5_moe_text"), "qwen3_5_moe"),
    ),
    "qwen3.8-flash-next": nested("text_config", qwen("qwen4_exp_text"), "qwen4_exp"),
    **dict.fromkeys(("mixtral-8x7b", "mixtral-8x22b"), local_experts("mixtral")),
    **dict.fromkeys(("gpt-oss-20b", "gpt-oss-120b"), local_experts("gpt_oss", experts_per_token=4, swiglu_limit=7.0)),
    **dict.fromkeys(("llama4-scout", "llama4-maverick"), llama4),
    "minimax-m2": local_experts("minimax_m2", use_routing_bias=True, scoring_func="sigmoid"),
    "minimax-m3": minimax_m3,
    "dots.llm1": glm("dots1"),
    "dots3": nested("text_config", glm("dots3_note_text", moe_shared_expert_intermediate_size=1536), "dots3_note"),
    "hunyuan-a13b": hunyuan,
    "hy3-preview": lambda m: by_types("hy_v3", moe_router_use_sigmoid=True, moe_router_enable_expert_bias=True)(m),
    "hy4": by_types("hy_v4"),
    **dict.fromkeys(("ernie-4.5-21b-a3b", "ernie-4.5-300b-a47b"), ernie),
    "longcat-flash": longcat,
    **dict.fromkeys(("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b", "nemotron-3-ultra-550b-a55b"), nemotron),
    "step-3": step_3,
    "step-3.7-flash": step_37,
    "olmoe-1b-7b": lambda m: (
        qwen("olmoe")(m) | {"intermediate_size": m.moe_intermediate_size, "moe_intermediate_size": None}
    ),
    "phi-3.5-moe": local_experts("phimoe"),
    "granite-3.0-1b-a400m": local_experts("granitemoe"),
    "mistral-large-3": mistral,
    "mistral-small-4-119b": glm("mistral4"),
    "mistral-large-4": nested("text_config", by_types("mistral_large4_text"), "mistral_large4"),
    "mimo-v2-flash": mimo,
    "a.x-k1": glm("axk1"),
    "beam-1.0-501b": by_types("beam"),
}


@pytest.mark.parametrize("name", model_names())
def test_a_config_in_the_keys_of_its_family_gives_the_preset(tmp_path, name):
    ref = load_model(name)
    comp = load_config(tmp_path, FAMILIES[name](ref))
    if not ref.n_layers:  # only the number of its MoE layers is known
        comp = load_model(tmp_path / "config.json")
        assert comp.n_moe_layers == ref.n_moe_layers
    fields = [field for field in FIELDS if ref.n_layers or field != "n_layers"]
    assert {field: getattr(comp, field) for field in fields} == {field: getattr(ref, field) for field in fields}
    assert comp.group_score == ref.group_score or not ref.is_grouped
    assert comp.caveat == ref.caveat
    assert not [
        note for note in comp.unverified if "not understood" in note or "says otherwise" in note or "taken" in note
    ]
