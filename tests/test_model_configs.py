"""Configs: which layers are MoE, scoring and sizes by any of their names, and what is said where a key is not understood."""

import pytest
from conftest import load_config
from test_model_families import FIELDS

from sim import InputError, load_model

BASE = {
    "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 12,
    "hidden_size": 64,
}  # fmt: skip
EVEN, ODD = list(range(0, 12, 2)), list(range(1, 12, 2))


def test_each_way_of_saying_which_layers_are_moe(tmp_path):
    for keys, layers in (
        ({"first_k_dense_replace": 9}, [9, 10, 11]),
        ({"n_dense_layers": 9}, [9, 10, 11]),  # DeepSeek's own config
        ({"moe_layer_num_skipped": 9}, [9, 10, 11]),  # Hunyuan
        ({"dense_mlp_idx": 9}, [9, 10, 11]),  # Inkling
        ({"moe_layer_freq": 2}, EVEN),  # DeepSeek and Megatron count from layer 0
        ({"moe_layer_freq": 2, "first_k_dense_replace": 3}, [4, 6, 8, 10]),
        ({"moe_layer_freq": [0] * 10 + [1, 1]}, [10, 11]),
        ({"moe_layer_freq": [0] * 10 + [1, 1, 1], "num_nextn_predict_layers": 1}, [10, 11]),
        ({"moe_layer_freq": "([0]*10+[1]*2)"}, [10, 11]),  # Megatron
        ({"moe_layer_freq": "[0, 1]*6"}, ODD),
        ({"moe_layer_freq": "([0] * 10 + [1] * 2)"}, [10, 11]),
        ({"moe_layer_freq": "2"}, EVEN),
        ({"model_type": "longcat_flash", "num_layers": 12, "num_hidden_layers": 24}, list(range(12))),
        ({"decoder_sparse_step": 2}, ODD),  # Qwen
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}, [5, 7, 9, 11]),
        ({"interleave_moe_layer_step": 4}, [3, 7, 11]),  # Llama 4
        ({"moe_layers": [2, 5]}, [2, 5]),
        ({"moe_layer_frequency": 3}, [2, 5, 8, 11]),  # Arctic
        ({"expert_layer_period": 4, "expert_layer_offset": 1}, [1, 5, 9]),  # Jamba
        ({"moe_layer_start_index": 3, "moe_layer_end_index": 8, "moe_layer_interval": 2}, [3, 5, 7]),  # ERNIE
        ({"moe_layer_start_index": 9, "moe_layer_end_index": -1}, [9, 10, 11]),
        ({"moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 10]}, list(range(1, 12))),
        ({"hybrid_override_pattern": "MEM*-EMM*EMM"}, [1, 5, 9]),  # Nemotron-H
        ({"hybrid_override_pattern": list("MEM*-EMM*EMM")}, [1, 5, 9]),
        ({"hybrid_layer_pattern": "MEM*|-EMM*EMM/*E/*E"}, [1, 5, 9]),  # Megatron: stages and draft layers
        ({"layers_block_type": ["mamba", "moe", "attention"] * 4}, [1, 4, 7, 10]),
        ({"mlp_layer_types": ["dense", "sparse"] * 6}, ODD),  # GLM, Laguna
        ({"layer_types": ["dense", "sparse"] * 6}, ODD),
        ({"moe_layers_enum": "1,3,5"}, [1, 3, 5]),  # Step-3
        ({"moe_layers_enum": "4-6"}, [4, 5, 6]),
        ({"moe_layers_enum": [1, 3, 13], "num_nextn_predict_layers": 2}, [1, 3]),  # draft layers are left out
        ({"moe_layers": [True, False] * 6}, EVEN),
        ({"block_configs": [{"ffn": {"moe": None}}, {"ffn": {"moe": {"num_local_experts": 8}}}] * 6}, ODD),  # AnyModel
        ({"block_configs": [{"block_type": "mamba"}, {"block_type": "moe", "n_routed_experts": 8}] * 6}, ODD),
        ({"is_moe_layer": [False, True] * 6}, ODD),  # EXAONE
        ({"moe_layer_layout": [0, 1] * 6}, ODD),  # SmallThinker
        ({"decoder_layout": ["attn_mlp", "attn_moe"] * 6}, ODD),  # any key, by its words
        ({"mtp_layers_block_type": ["attention", "moe"]}, list(range(12))),
        ({"model_type": "switch_transformers", "decoder_sparse_step": 4}, [1, 5, 9]),
        ({"num_local_experts": [0, 8] * 6}, ODD),
        ({"n_routed_experts_per_layer": [0, 8] * 6}, ODD),
        ({"layer_types": ["full_attention", "minimax_m3_sparse"] * 6}, list(range(12))),  # attention only
        ({"hybrid_layer_pattern": [0, 1] * 6}, list(range(12))),  # sliding windows
        ({}, list(range(12))),
    ):
        model = load_config(tmp_path, BASE | keys)
        assert model.moe_layer_ids == tuple(layers)
        assert (model.n_layers, model.n_moe_layers) == (12, len(layers))
        assert not [note for note in model.unverified if "layer" in note or "understood" in note]


def test_what_a_type_has_by_default_is_used_and_said(tmp_path):
    for kind, layers in (
        ("deepseek_v3", range(3, 12)),
        ("lfm2_moe", range(2, 12)),
        ("jamba", range(1, 12, 2)),
        ("arctic", range(1, 12, 2)),
        ("ernie4_5_moe", range(1, 12)),
        ("step3p5", range(3, 12)),
    ):
        model = load_config(tmp_path, BASE | {"model_type": kind})
        assert model.moe_layer_ids == tuple(layers)
        assert [note for note in model.unverified if f"as {kind} has by default" in note]


def test_a_key_about_moe_layers_that_is_not_understood_makes_them_unknown(tmp_path):
    for strange in (
        {"moe_layer_parity": "odd"}, {"mlp_layer_types": "sparse"}, {"mlp_layer_types": [0, 1] * 6},
        {"hybrid_override_pattern": [1, 2]}, {"block_configs": [3]}, {"moe_layers": 6}, {"moe_layers": []},
        {"every_third_layer_is_dense": True}, {"expert_block_stride": 3}, {"sparse_layer_mask_name": "a"},
        {"no_split_block_types": ["MoEBlock", "moe_layer"]},
        {"layers_block_type": "MEME"}, {"layer_types": 3}, {"layer_ffn_types": "MDMD"},
        {"layer_specs": [{"mlp": "moe"}, {"mlp": "dense"}]},
    ):  # fmt: skip
        model = load_config(tmp_path, BASE | strange)
        (key,) = strange
        assert (model.n_layers, model.n_moe_layers, model.moe_layer_ids) == (12, 0, ())
        assert [note for note in model.unverified if key in note and "not understood" in note]
        partly = load_config(tmp_path, BASE | strange | {"first_k_dense_replace": 2})
        assert partly.n_moe_layers == 10
        assert [note for note in partly.unverified if key in note]


def test_what_a_type_needs_and_the_file_lacks_is_said(tmp_path):
    model = load_config(tmp_path, BASE | {"model_type": "nemotron_h"})
    assert (model.n_layers, model.n_moe_layers) == (12, 0)
    assert "moe_layer_ids (unknown: no layers_block_type in config.json)" in model.unverified
    sizes = {"hidden_size": None, "intermediate_size": 128}
    assert (
        "moe_intermediate_size (not in config.json; intermediate_size taken)"
        in load_config(tmp_path, BASE | sizes | {"model_type": "qwen3_moe"}).unverified
    )
    assert "hidden_size (not in config.json)" in load_config(tmp_path, BASE | sizes).unverified


def test_other_keys_that_speak_of_experts_are_named(tmp_path):
    odd = {
        "expert_choice": True,
        "router_kind": "hash",
        "moe_router_bias": True,
        "use_expert_lottery": False,
        "ep_size": 4,
    }
    model = load_config(tmp_path, BASE | odd)
    told = " ".join(model.unverified)
    assert "expert_choice True (not understood)" in told
    assert "router_kind hash (not understood)" in told
    assert "moe_router_bias True (not understood)" in told
    assert "lottery" not in told
    assert model.n_moe_layers == 12
    many = load_config(tmp_path, BASE | {f"moe_{i}": i for i in range(1, 10_000)})
    assert len(many.unverified) < 30
    assert "9979 more keys" in many.unverified[-1]


def test_a_list_of_layers_wins_and_what_disagrees_is_named(tmp_path):
    model = load_config(
        tmp_path, BASE | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 10, "first_k_dense_replace": 3}
    )
    assert model.n_moe_layers == 10
    assert [note for note in model.unverified if "first_k_dense_replace 3 (mlp_layer_types says otherwise" in note]
    model = load_config(tmp_path, BASE | {"num_experts": 16})
    assert model.n_experts == 16
    assert [note for note in model.unverified if "num_local_experts 8 (num_experts 16 was taken)" in note]


def test_a_type_that_is_not_known_says_what_is_assumed(tmp_path):
    model = load_config(tmp_path, BASE | {"model_type": "newcomer", "intermediate_size": 128})
    assert (model.scoring, model.has_bias, model.n_moe_layers) == ("softmax", False, 12)
    assert model.moe_intermediate_size == 128
    told = " ".join(model.unverified)
    for field in ("scoring", "has_bias", "moe_layer_ids", "moe_intermediate_size"):
        assert field in told
    said = BASE | {"model_type": "newcomer", "first_k_dense_replace": 0, "moe_intermediate_size": 8}
    assert not load_config(tmp_path, said | {"scoring_func": "sigmoid", "use_expert_bias": True}).unverified
    for name in ("Dots1ForCausalLM", "Exaone_MoEForCausalLM"):
        by_class = BASE | {"model_type": None, "architectures": [name]}
        assert load_config(tmp_path, by_class).scoring == "sigmoid"


@pytest.mark.parametrize(
    ("keys", "scoring", "has_bias"),
    [
        ({"score_function": "sigmoid"}, "sigmoid", False),
        ({"model_type": "dots1", "scoring_func": "noaux_tc"}, "sigmoid", True),  # the method under the wrong key
        ({"score_func": "sigmoid", "topk_method": "noaux_tc"}, "sigmoid", True),
        (
            {"moe_router_activation_func": "sigmoid", "use_routing_bias": False, "topk_method": "noaux_tc"},
            "sigmoid",
            False,
        ),
        ({"scoring_func": "sqrtsoftplus", "use_expert_bias": True}, "sqrtsoftplus", True),
        ({"expert_selection_fn": "sigmoid"}, "sigmoid", False),
        ({"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}, "sigmoid", True),
        ({"model_type": "lfm2_moe", "use_expert_bias": False}, "sigmoid", False),
        ({"router_bias": True}, "softmax", False),  # of the linear layer: part of the logits
        ({"scoring_func": "Softmax"}, "softmax", False),
        ({"model_type": "smallthinker", "moe_primary_router_apply_softmax": False}, "sigmoid", False),
        ({"model_type": "smallthinker", "moe_primary_router_apply_softmax": True}, "softmax", False),
    ],
)
def test_scoring_and_bias_by_any_of_their_names(tmp_path, keys, scoring, has_bias):
    model = load_config(tmp_path, BASE | keys)
    assert (model.scoring, model.has_bias) == (scoring, has_bias)
    assert model.group_score == ("top2_sum" if has_bias else "max")


@pytest.mark.parametrize(
    ("keys", "n_group", "group_score"),
    [
        ({"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, 4, "max"),
        ({"n_group": 4, "topk_group": 2, "topk_method": "noaux_tc"}, 4, "top2_sum"),
        ({"n_group": 4, "topk_group": 2, "topk_method": "greedy"}, 1, "max"),
        ({"n_group": None, "topk_group": None}, 1, "max"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": None}, 1, "max"),  # Megatron: no group_limited_topk
    ],
)
def test_groups_are_those_of_the_top_k_method(tmp_path, keys, n_group, group_score):
    model = load_config(tmp_path, BASE | keys)
    assert (model.n_group, model.group_score, model.has_bias) == (n_group, group_score, group_score == "top2_sum")


def test_an_expert_without_a_gate_has_two_matrices(tmp_path):
    for keys, matrices in (
        ({"hidden_act": "silu"}, 3),
        ({"hidden_act": "relu2"}, 2),
        ({"mlp_hidden_act": "relu2", "hidden_act": "silu"}, 2),
        ({"gated_linear_unit": False}, 2),
        ({"dense_act_fn": "gated-gelu", "model_type": "switch_transformers"}, 3),
        ({"model_type": "switch_transformers", "dense_act_fn": "relu"}, 2),
        ({"hidden_act": "gelu"}, 3),  # Grok, Gemma: gated
    ):
        assert load_config(tmp_path, BASE | keys).expert_matrices == matrices


def test_shared_experts_are_those_of_the_file_else_of_the_type(tmp_path):
    for keys, n_shared in (
        ({"model_type": "llama4"}, 1),
        ({"model_type": "llama4", "num_shared_experts": 0}, 0),
        ({"shared_expert_intermediate_size": 64}, 1),
        ({"shared_expert_intermediate_size": [0] + [64] * 11}, 1),
        ({"shared_expert_intermediate_size": 0}, 0),
    ):
        assert load_config(tmp_path, BASE | keys).n_shared_experts == n_shared


_NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16}
_INT4 = {"num_bits": 4, "type": "int", "group_size": 32}
_MIXED = {
    "model.layers.0.mlp.shared_expert.up_proj": {"quant_algo": "FP8"},
    "model.layers.0.mlp.experts.0.up_proj": {"quant_algo": "W4A16_NVFP4"},
}


def test_how_the_experts_are_stored_is_read(tmp_path):
    for keys, dtype in (
        ({}, "unknown"),
        ({"torch_dtype": "bfloat16", "quantization_config": None}, "bf16"),
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8_e4m3_block128"),  # DeepSeek-V3
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}, "mxfp4"),  # gpt-oss
        ({"config_groups": {"group_0": {"weights": _INT4, "targets": ["Linear"]}}}, "int4_group32"),  # Kimi-K2.5
        ({"config_groups": {"group_0": {"weights": _NVFP4}}, "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": _MIXED}, "nvfp4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4_group128"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "torchao", "quant_type": "int4wo-128"}, "int4"),
        ({"bits": 4, "group_size": 64}, "int4_group64"),  # MLX
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}}, "mxfp4"),
        ({"quant_method": "fp8", "ignore": ["re:.*mlp.experts.*"], "dtype": "bfloat16"}, "bf16"),
        ({"expert_dtype": "fp4", "quant_method": "fp8"}, "fp4"),  # DeepSeek-V4
        ({"quant_method": "new"}, "unknown"),
    ):
        outer = {key: keys[key] for key in ("torch_dtype", "dtype", "expert_dtype") if key in keys}
        inner = {key: value for key, value in keys.items() if key not in outer and key != "quantization_config"}
        model = load_config(
            tmp_path, {"text_config": BASE, **outer} | ({"quantization_config": inner} if inner else {})
        )
        assert model.routed_dtype == dtype
        assert any("routed_dtype" in note for note in model.unverified) == (keys == {"quant_method": "new"})


def test_the_file_that_modelopt_writes_beside_a_config_is_read(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    assert load_config(tmp_path, BASE | {"torch_dtype": "bfloat16"}).routed_dtype == "nvfp4"


def test_the_language_model_is_found_at_any_depth(tmp_path):
    for path in (
        ["text_config"], ["language_config"], ["llm_config"], ["thinker_config", "text_config"],
        ["a", "b", "c", "d", "e", "language_model"],
    ):  # fmt: skip
        config = dict(BASE)
        for key in reversed(path):
            config = {key: config, "vision_config": {"num_experts": 64, "num_experts_per_tok": 1}, "hidden_size": 7}
        model = load_config(tmp_path, config)
        assert (model.n_experts, model.hidden_size, model.n_layers) == (8, 64, 12)
    talker = {"text_config": BASE | {"num_experts_per_tok": 4}}
    assert load_config(tmp_path, {"talker_config": talker, "thinker_config": {"text_config": BASE}}).top_k == 2
    inner = {key: value for key, value in BASE.items() if key != "model_type"}
    outer = {"model_type": "glm4_moe", "first_k_dense_replace": 2, "text_config": inner}
    assert load_config(tmp_path, outer).moe_layer_ids == tuple(range(2, 12))


def test_keys_inside_an_object_of_experts_are_understood_as_such(tmp_path):
    """Moondream 3: config.text.moe; and what is not understood there is told."""
    moe = {"num_experts": 64, "start_layer": 4, "experts_per_token": 8, "expert_inner_dim": 1024, "every_other": 2}
    config = {
        "config": {"text": {"dim": 2048, "ff_dim": 8192, "n_layers": 24, "moe": moe}, "vision": {"enc_dim": 1152}}
    }
    model = load_config(tmp_path, {"model_type": "moondream3"} | config)
    assert (model.n_experts, model.top_k, model.moe_layer_ids) == (64, 8, tuple(range(4, 24)))
    assert (model.hidden_size, model.moe_intermediate_size) == (2048, 1024)
    assert any("moe_every_other" in note for note in model.unverified)
    assert not any("mistral" in note for note in model.unverified)


def test_groups_that_are_half_said_are_those_of_the_type_or_refused(tmp_path):
    v3 = BASE | {"model_type": "deepseek_v3", "num_local_experts": 64, "first_k_dense_replace": 0}
    assert load_config(tmp_path, v3 | {"n_group": 8}).topk_group == 4
    assert load_config(tmp_path, v3 | {"n_group": 4}).topk_group == 1
    assert load_config(tmp_path, v3 | {"n_group": 0, "topk_group": 0}).n_group == 1
    with pytest.raises(InputError, match="topk_group must be a whole number of at least 1, not 0"):
        load_config(tmp_path, v3 | {"n_group": 8, "topk_group": 0})


def test_deepseeks_own_config(tmp_path):
    ref = load_model("deepseek-v3")
    config = {
        "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
        "n_shared_experts": 1,
    }  # fmt: skip
    config |= {
        "n_routed_experts": 256, "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4,
        "score_func": "sigmoid",
    }  # fmt: skip
    comp = load_config(tmp_path, config)
    assert {field: getattr(comp, field) for field in FIELDS} == {field: getattr(ref, field) for field in FIELDS}
    v4 = load_config(tmp_path, config | {"n_dense_layers": 0, "score_func": "sqrtsoftplus", "n_hash_layers": 3})
    assert (v4.scoring, v4.has_bias, "first 3 MoE layers" in v4.caveat) == ("sqrtsoftplus", True, True)


def test_params_json_in_a_folder(tmp_path):
    config = {"dim": 64, "n_layers": 4, "hidden_dim": 128, "moe": {"num_experts": 8, "num_experts_per_tok": 2}}
    load_config(tmp_path, config, "params.json")
    model = load_model(tmp_path)
    assert (model.n_experts, model.top_k, model.n_moe_layers) == (8, 2, 4)
    assert (model.hidden_size, model.moe_intermediate_size) == (64, 128)


def test_layers_with_different_numbers_are_refused_by_name(tmp_path):
    for keys in (
        {"n_routed_experts_per_layer": [0, 256, 192]},
        {"layers_num_experts": [8, 4] * 6},
        {"layer_expert_counts": [8, 4] * 6},
        {"kept_experts_per_layer": {"0": [0, 1, 2], "1": [0, 4]}},
        {"n_routed_experts_per_layer": {"1": 256, "2": 192}},
        {"num_local_experts": [8, 4] * 6},
        {"reap_pruning": {"n_routed_experts_per_layer": [8, 4] * 6}},
        {"block_configs": [{"ffn": {"moe": {"num_local_experts": n}}} for n in (8, 4)] * 6},
        {"num_experts_per_tok": [2, 1] * 6},
    ):
        with pytest.raises(
            InputError, match=r"_per_layer|layers?_\w+|num_local_experts|block_configs|num_experts_per_tok"
        ):
            load_config(tmp_path, BASE | keys)


def test_zero_experts_and_hash_layers_are_caveats(tmp_path):
    assert "2 zero-compute experts" in load_config(tmp_path, BASE | {"num_zero_experts": 2}).caveat
    assert "its zero-compute expert is" in load_config(tmp_path, BASE | {"num_zero_experts": 1}).caveat
    nllb = {"model_type": "nllb-moe", "num_experts": 8, "decoder_layers": 12, "decoder_ffn_dim": 32}
    model = load_config(tmp_path, nllb | {"encoder_sparse_step": 4})
    assert (model.top_k, model.expert_matrices, model.n_layers, model.moe_intermediate_size) == (2, 2, 12, 32)
    assert "encoder has MoE layers" in model.caveat
    assert "attention is routed" in load_config(tmp_path, BASE | {"model_type": "jetmoe"}).caveat
    assert "first 3 MoE layers route by a hash" in load_config(tmp_path, BASE | {"num_hash_layers": 3}).caveat
    types = {"model_type": "deepseek_v4", "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 10}
    model = load_config(tmp_path, BASE | types)
    assert "first 2 MoE layers" in model.caveat
    assert model.n_moe_layers == 12
    assert not load_config(tmp_path, BASE | {"model_type": "deepseek_v4", "num_hash_layers": 0}).caveat


HOSTILE = [
    True, -1, 1.5, float("nan"), "x", "", [], {}, [[]], [None], [{}], 10**30, [10**30], "9" * 10**5, [0] * 10**5,
    {"a": {}},
]  # fmt: skip


def test_malformed_values_of_any_field_end_in_one_line(tmp_path):
    from sim.model.keys import KEYS

    for names in KEYS.values():
        for value in HOSTILE:
            told = ""
            try:
                assert load_config(tmp_path, BASE | {names[0]: value}).n_moe_layers in range(13)
            except InputError as error:
                told = str(error)
            assert "\n" not in told
            assert len(told) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not JSON|has no experts|not a JSON object"),
        ('{"a":' * 900 + "{}" + "}" * 900, "has no experts|not JSON"),
        ({f"part{i}": {"deep": {}} for i in range(10_000)} | {f"moe_{i}": i for i in range(10_000)}, "has no experts"),
        (BASE | {"moe_layers": "0-9999 " * 9000}, "at most 10000 layer numbers"),
        ("3", "not a JSON object"),
        ("null", "not a JSON object"),
        (BASE | {"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 10000"),
        (BASE | {"num_hidden_layers": True}, "num_hidden_layers must be"),
        (BASE | {"num_hidden_layers": "12"}, "num_hidden_layers must be"),
        (BASE | {"first_k_dense_replace": 12}, "no layer has experts"),
        (BASE | {"first_k_dense_replace": -1}, "first_k_dense_replace must be"),
        (BASE | {"first_k_dense_replace": [3]}, "first_k_dense_replace must be a whole number .* not \\[3\\]"),
        (BASE | {"shared_intermediate_size": "64"}, "shared_intermediate_size must be a whole number"),
        (BASE | {"mlp_only_layers": 3}, "mlp_only_layers must be a list of at most 10000 layer numbers, not 3"),
        (BASE | {"moe_layer_freq": 0}, "moe_layer_freq must be"),
        (BASE | {"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq has 3 values, the model has 12 layers"),
        (BASE | {"moe_layer_freq": [2] * 12}, "a 0 or 1 for each"),
        (BASE | {"moe_layers": [3, 40]}, "a layer of moe_layers must be a whole number from 0 to 11"),
        (BASE | {"moe_layers_enum": "3;4"}, "layer numbers such as 3,4,5"),
        (BASE | {"hybrid_override_pattern": "MM*-MM*-MM*-"}, "no layer has experts, by hybrid_override_pattern"),
        (BASE | {"expert_layer_period": 2, "expert_layer_offset": 2}, "expert_layer_offset must be"),
        ({"hidden_size": 4096, "num_hidden_layers": 32}, "has no experts"),
        ({"num_experts": 8}, "has no top-k"),
        ({"num_experts": 0, "num_experts_per_tok": 2}, "not a mixture of experts: num_experts is 0"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "not a mixture of experts: num_experts is 1"),
        ({"num_experts": 8, "num_experts_per_tok": "2"}, "num_experts_per_tok must be a whole number .* not '2'"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "n_group": {}}, "n_group must be a whole number"),
        (BASE | {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}, "no layer has experts, by mlp_only_layers"),
        ({"num_experts": 512, "num_experts_per_tok": 8, "router_n_groups": 8}, "router_n_groups 8: .* not simulated"),
        ({"num_experts": 64, "num_experts_per_tok": 8, "model_type": "PanguProMoE"}, "pangupromoe: .* not simulated"),
        ({"num_experts": "8", "num_experts_per_tok": 2}, "num_experts must be a whole number from 2 to 32767, not '8'"),
        ({"num_experts": 8.5, "num_experts_per_tok": 2}, "num_experts must be"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "above the 8 experts"),
        ({"num_experts": 10, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}, "not divisible"),
        ([1, 2], "not a JSON object"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "scoring_func": 3}, "must be a name"),
        (BASE | {"enable_moe_block": False}, "has no experts: enable_moe_block is false"),
        (BASE | {"use_expert_bias": "yes"}, "use_expert_bias must be true or false"),
        (
            {"peft_type": "LORA", "base_model_name_or_path": "a/b"},
            "an adapter of a/b; give the config.json of that model",
        ),
        ({"speculators_model_type": "eagle3", "transformer_layer_config": BASE}, "a draft model of speculators"),
        ({"general.architecture": "deepseek2", "deepseek2.expert_count": 256}, "GGUF metadata are not read"),
        ({"metadata": {"general.architecture": {"value": "qwen3moe"}}}, "GGUF metadata are not read"),
    ],
)
def test_configs_that_cannot_be_right_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_config(tmp_path, content)


# The configs of ../shared/cases


@pytest.mark.parametrize(
    ("file", "right"),
    [
        ("c01-expert-period", {"n_moe_layers": 16, "moe_layer_ids": tuple(range(1, 32, 2))}),
        ("c02-hybrid-pattern", {"n_moe_layers": 23, "expert_matrices": 2, "scoring": "sigmoid", "has_bias": True}),
        ("c03-layer-freq-list", {"n_moe_layers": 57, "has_bias": True}),
        ("c04-layers-enum", {"n_moe_layers": 42, "scoring": "sigmoid", "has_bias": True}),
        ("c05-num-dense-layers", {"n_moe_layers": 22, "scoring": "sigmoid", "has_bias": True}),
        ("c06-layer-start-index", {"n_moe_layers": 27, "has_bias": True}),
        ("c07-expert-bias", {"n_moe_layers": 19, "has_bias": True, "group_score": "top2_sum"}),
        ("c08-nested-twice", {"n_experts": 128, "top_k": 8, "n_moe_layers": 48}),
        ("c09-ffn-config", {"n_experts": 16, "top_k": 4, "n_moe_layers": 40, "hidden_size": 6144}),
        ("c09-ffn-config", {"moe_intermediate_size": 10752}),
        ("c12-layer-frequency", {"n_moe_layers": 18}),
        ("e01-one-dense-layer", {"n_layers": 4, "moe_layer_ids": (1, 2, 3)}),
    ],
)
def test_field_cases(shared, file, right):
    model = load_model(shared / "cases" / f"{file}.json")
    assert {field: getattr(model, field) for field in right} == right
    assert not [note for note in model.unverified if "understood" in note or "layer" in note]


def test_field_cases_that_are_not_modelled(shared):
    assert load_model(shared / "cases/c10-zero-experts.json").caveat == load_model("longcat-flash").caveat
    with pytest.raises(InputError, match="n_routed_experts_per_layer: layers have 192 to 256 experts"):
        load_model(shared / "cases/c11-experts-per-layer.json")
