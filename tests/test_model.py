import re
import tomllib
from dataclasses import replace

import pytest

from sim import InputError, ModelSpec, load_model, model_names


def test_all_presets_load_with_their_sources():
    models = [load_model(name) for name in model_names()]
    assert len(models) == 63
    assert all(model.source for model in models)
    grouped = {model.name for model in models if model.is_grouped}
    assert {"deepseek-v2", "deepseek-v3", "deepseek-r1", "ling-1t", "a.x-k1", "beam-1.0-501b"} <= grouped
    assert not grouped & {"kimi-k2", "glm-4.5", "qwen3-235b-a22b", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v4-pro"}
    assert not load_model("deepseek-v3").unverified
    for name in ("glm-4.6", "deepseek-v4.1-flash", "a.x-k1", "beam-1.0-501b", "glm-5.3-flash", "dots3", "hy4"):
        assert any("every field" in text for text in load_model(name).unverified), name  # not read from a checkpoint


def test_presets_say_which_layers_are_moe():
    assert load_model("deepseek-v3").moe_layer_ids == tuple(range(3, 61))
    assert load_model("deepseek-v3").n_layers == 61
    assert load_model("llama4-maverick").moe_layer_ids == tuple(range(1, 48, 2))
    assert load_model("step-3").moe_layer_ids == tuple(range(4, 60))
    assert load_model("step-3").n_layers == 61
    nano = load_model("nemotron-3-nano-30b-a3b")
    assert (nano.n_layers, nano.moe_layer_ids[:5]) == (52, (1, 3, 6, 8, 10))
    for model in map(load_model, model_names()):
        assert len(model.moe_layer_ids) == model.n_moe_layers > 0, model.name
        told = any("moe_layer_ids" in text for text in model.unverified)
        assert model.n_layers > model.moe_layer_ids[-1] or (told and not model.n_layers), model.name


def test_an_id_is_one_id():
    from importlib import resources

    text = resources.files("sim.model").joinpath("presets.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["models"]
    ids = [i for row in rows.values() for i in (row["hf_id"], *row.get("also", []), *row.get("assumed", []))]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", i) for i in ids)
    assert len(set(ids)) == len(ids)


def test_hugging_face_ids_with_the_usual_endings():
    for preset, names in (
        ("deepseek-v3", "DeepSeek-V3 deepseek-ai/DeepSeek-V3-0324 DeepSeek-V3-Base"),
        ("deepseek-v3", "nvidia/DeepSeek-V3-0324-NVFP4 mlx/DeepSeek-V3-4bit"),
        ("deepseek-r1", "deepseek-ai/DeepSeek-R1-0528 nvidia/DeepSeek-R1-0528-NVFP4-v2 nvidia/DeepSeek-R1-FP4"),
        ("deepseek-r1", "DeepSeek-R1-Zero RedHatAI/DeepSeek-R1-0528-quantized.w4a16 unsloth/DeepSeek-R1-GGUF"),
        ("deepseek-r1", "cognitivecomputations/DeepSeek-R1-AWQ"),
        ("deepseek-v3.1", "deepseek-ai/DeepSeek-V3.1-Terminus DeepSeek-V3.1-Base"),
        ("deepseek-v3.2", "deepseek-ai/DeepSeek-V3.2-Exp DeepSeek-V3.2-Speciale"),
        ("deepseek-v4-flash", "RedHatAI/DeepSeek-V4-Flash-NVFP4-FP8"),
        ("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite-Chat"),
        ("kimi-k2", "moonshotai/Kimi-K2-Thinking moonshotai/Kimi-K2-Instruct-0905 Kimi-K2-Base"),
        ("kimi-k2", "nvidia/Kimi-K2-Thinking-NVFP4"),
        ("kimi-k2.5", "moonshotai/Kimi-K2.5 nvidia/Kimi-K2.5-NVFP4"),
        ("glm-4.7", "zai-org/GLM-4.7 zai-org/GLM-4.7-FP8 QuantTrio/GLM-4.7-AWQ"),
        ("glm-4.7-flash", "zai-org/GLM-4.7-Flash"),
        ("glm-4.5-air", "zai-org/GLM-4.5-Air-FP8 GLM-4.5-Air-Base"),
        ("glm-5", "zai-org/GLM-5-FP8 zai-org/GLM-5.1 zai-org/GLM-5.2-FP8"),
        ("minimax-m2", "MiniMaxAI/MiniMax-M2.5 MiniMax-M2.5-BF16"),
        ("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8 Qwen/Qwen3-235B-A22B-Thinking-2507"),
        ("qwen3-235b-a22b", "Qwen3-235B-A22B-GPTQ-Int4"),
        ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B-Base Qwen/Qwen3-30B-A3B-Thinking-2507"),
        ("qwen3-next-80b-a3b", "Qwen/Qwen3-Next-80B-A3B-Thinking cpatonn/Qwen3-Next-80B-A3B-Instruct-AWQ-4bit"),
        ("qwen3-coder-480b-a35b", "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("nemotron-3-nano-30b-a3b", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8"),
        ("llama4-maverick", "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8 meta-llama/Llama-4-Maverick-17B-128E"),
        ("ling-1t", "inclusionAI/Ring-1T inclusionAI/Ling-1T-FP8"),
        ("ernie-4.5-21b-a3b", "baidu/ERNIE-4.5-21B-A3B-Thinking"),
        ("gpt-oss-20b", "unsloth/gpt-oss-20b-BF16"),
        ("beam-1.0-501b", "reflection/Beam-1.0-501B-A23B"),
    ):
        for name in names.split():
            assert load_model(name).name == preset, name
            assert load_model(name.upper()).name == preset, name


def test_other_models_are_not_taken_for_a_preset():
    for name in (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-8B",
        "Qwen/Qwen3-Next", "zai-org/GLM-4.5V", "zai-org/GLM-4-9B-0414", "moonshotai/Kimi-K2.9", "deepseek-v3.3", "DeepSeek-V4",
        "openai/gpt-oss", "Qwen3-VL-235B-A22B-Instruct", "MiniMax-M1", "FP8", "-", "x" * 9999,
    ):  # fmt: skip
        with pytest.raises(InputError, match="is not known"):
            load_model(name)


def test_a_name_that_is_only_assumed_to_be_the_preset_says_so():
    assert (
        "that MiniMaxAI/MiniMax-M2.1 has the router and sizes of MiniMaxAI/MiniMax-M2"
        in load_model("MiniMax-M2.1").unverified
    )
    assert len(load_model("MiniMax-M2.5").unverified) == len(load_model("minimax-m2").unverified)


def test_a_quantised_copy_has_its_own_dtype():
    stored = {
        name: load_model(name).routed_dtype
        for name in ("Qwen3-235B-A22B-FP8", "amd/DeepSeek-R1-MXFP4-Preview", "DeepSeek-R1-0528")
    }
    assert [*stored.values()] == ["fp8", "mxfp4", load_model("deepseek-r1").routed_dtype]


def test_a_link_to_the_hub_is_an_id_and_what_cannot_be_read_says_what_to_give(tmp_path):
    assert load_model("https://huggingface.co/deepseek-ai/DeepSeek-V3/").name == "deepseek-v3"
    for name, words in (
        (tmp_path, "is a folder without a config.json"),
        ("DeepSeek-V3-Q4_K_M.gguf", "GGUF files are not read; give the config.json"),
        ("Qwen/Qwen3-8B", "hf download Qwen/Qwen3-8B config.json"),
    ):
        with pytest.raises(InputError, match=words):
            load_model(name)


def test_a_spec_is_returned_as_it_is():
    model = load_model("deepseek-v3")
    assert load_model(model) is model
    with pytest.raises(InputError, match="`model` 3: must be a name, a path or a ModelSpec"):
        load_model(3)


def test_missing_files_are_called_missing():
    for path in ("/no/such/DeepSeek-V3", "./deepseek-v3", "a/b/deepseek-v3"):
        with pytest.raises(InputError, match="cannot be read: it does not exist"):
            load_model(path)


def test_layer_ids_and_their_number_agree():
    model = ModelSpec("m", 8, 2, n_layers=6, moe_layer_ids=(1, 3, 5))
    assert model.n_moe_layers == 3
    assert ModelSpec("m", 8, 2, n_moe_layers=3).moe_layer_ids == (0, 1, 2)
    assert replace(model, n_moe_layers=2).moe_layer_ids == (0, 1)
    assert replace(model, n_moe_layers=9).n_layers == 0
    assert replace(model, n_moe_layers=0).moe_layer_ids == ()
    assert ModelSpec("m", 8, 2).n_moe_layers == 0
    for wrong in ((3, 1), (1, 1), (-1,), (6,), (True,), (1.0,), "1"):
        with pytest.raises(InputError, match=r"MoE layer|moe_layer_ids"):
            ModelSpec("m", 8, 2, n_layers=6, moe_layer_ids=wrong)


def test_deepseek_rules():
    v3, v2 = load_model("deepseek-v3"), load_model("DeepSeek-V2")
    assert (v3.n_experts, v3.top_k, v3.n_group, v3.topk_group, v3.n_moe_layers) == (256, 8, 8, 4, 58)
    assert (v3.scoring, v3.group_score, v3.has_bias) == ("sigmoid", "top2_sum", True)
    assert (v2.n_experts, v2.top_k, v2.n_group, v2.topk_group) == (160, 6, 8, 3)
    assert (v2.scoring, v2.group_score, v2.has_bias) == ("softmax", "max", False)


def test_a_config_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe not json")
    with pytest.raises(InputError, match="UTF-8"):
        load_model(tmp_path / "config.json")


def test_a_spec_round_trips_through_its_repr():
    model = load_model("deepseek-v3")
    assert eval(repr(model), {"ModelSpec": ModelSpec}) == model
