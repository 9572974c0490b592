import json

import pytest

from sim import InputError, ModelSpec, load_model, model_names


def test_all_presets_load_with_their_sources():
    models = [load_model(name) for name in model_names()]
    assert len(models) == 53
    assert all(model.source for model in models)
    grouped = {model.name for model in models if model.is_grouped}
    assert {"deepseek-v2", "deepseek-v3", "deepseek-r1", "ling-1t"} <= grouped
    assert not grouped & {"kimi-k2", "glm-4.5", "qwen3-235b-a22b", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v4-pro"}
    assert load_model("glm-4.6").unverified
    assert not load_model("deepseek-v3").unverified


def test_deepseek_rules():
    v3, v2 = load_model("deepseek-v3"), load_model("DeepSeek-V2")
    assert (v3.n_experts, v3.top_k, v3.n_group, v3.topk_group, v3.n_moe_layers) == (256, 8, 8, 4, 58)
    assert (v3.scoring, v3.group_score, v3.has_bias) == ("sigmoid", "top2_sum", True)
    assert (v2.n_experts, v2.top_k, v2.n_group, v2.topk_group) == (160, 6, 8, 3)
    assert (v2.scoring, v2.group_score, v2.has_bias) == ("softmax", "max", False)


def test_nearest_name_is_suggested():
    with pytest.raises(InputError, match="did you mean deepseek-v3"):
        load_model("deepsek-v3")


V3 = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
}
QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "decoder_sparse_step": 1,
}
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
}


def _load(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return load_model(path)


def test_config_json_variants(tmp_path):
    v3 = _load(tmp_path, V3)
    ref = load_model("deepseek-v3")
    for field in (
        "n_experts",
        "top_k",
        "n_group",
        "topk_group",
        "scoring",
        "group_score",
        "has_bias",
        "n_moe_layers",
        "hidden_size",
    ):
        assert getattr(v3, field) == getattr(ref, field), field
    qwen = _load(tmp_path, QWEN)
    assert (qwen.n_experts, qwen.top_k, qwen.n_group, qwen.scoring, qwen.n_moe_layers) == (128, 8, 1, "softmax", 94)
    assert any("scoring" in text for text in qwen.unverified)
    mixtral = _load(tmp_path, MIXTRAL)
    assert (mixtral.n_experts, mixtral.top_k, mixtral.n_moe_layers) == (8, 2, 32)
    nested = _load(tmp_path, {"model_type": "kimi_k25", "text_config": V3})
    assert nested.n_experts == 256
    v2 = {k: v for k, v in V3.items() if k not in ("scoring_func", "model_type")} | {
        "topk_method": "group_limited_greedy"
    }
    grouped = _load(tmp_path, v2)
    assert (grouped.group_score, grouped.has_bias, grouped.n_group) == ("max", False, 8)
    assert _load(tmp_path, V3 | {"topk_method": "greedy"}).n_group == 1
    assert _load(tmp_path, V3 | {"n_group": None, "topk_group": None}).n_group == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 4096, "num_hidden_layers": 32}, "has no experts"),
        ({"num_experts": 8}, "has no top-k"),
        ({"num_experts": 0, "num_experts_per_tok": 2}, "n_experts must be"),
        ({"num_experts": "8", "num_experts_per_tok": 2}, "n_experts must be"),
        ({"num_experts": 8.5, "num_experts_per_tok": 2}, "n_experts must be"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "above the 8 experts"),
        ({"num_experts": 10, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}, "not divisible"),
        ([1, 2], "not a JSON object"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "scoring_func": 3}, "must be a name"),
    ],
)
def test_bad_configs_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        _load(tmp_path, config)


def test_unreadable_configs_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_model(tmp_path / "absent.json")
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe not json")
    with pytest.raises(InputError, match="UTF-8"):
        load_model(path)


def test_a_spec_round_trips_through_its_repr():
    model = load_model("deepseek-v3")
    assert eval(repr(model), {"ModelSpec": ModelSpec}) == model
