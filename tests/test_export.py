"""`epsim export`: maps in every format, checked by reading them back, and scored as the placement itself."""

import json
import os

import numpy as np
import pytest
from conftest import fails, plain, run

from sim import ModelSpec, load_model, place
from sim.placement import FORMATS, place_balanced, read_placement, spread_copies


@pytest.fixture
def trace(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(32)[:4] for _ in range(300)], np.int16).reshape(100, 3, 4)
    np.savez(tmp_path / "trace.npz", topk_ids=ids, sequence_lengths=np.full(20, 5))
    return tmp_path / "trace.npz"


EXPORT = ["export", "--model", "gpt-oss-20b", "--ep", "4"]


@pytest.mark.parametrize("form", FORMATS)
def test_export(trace, tmp_path, capsys, form):
    out = tmp_path / "out.json"
    assert run(*EXPORT, "--placement", "eplb+4", "--fit-on", trace, "--format", form, "--out", out) == 0
    assert "3 layers x 36 slots on 4 ranks" in capsys.readouterr().out
    with np.load(trace) as arrays:
        loads = [np.bincount(layer.ravel(), minlength=32) for layer in arrays["topk_ids"].transpose(1, 0, 2)]
    found = read_placement(out, load_model("gpt-oss-20b"), 4)
    ref = place_balanced("eplb+4", ModelSpec("x", 32, 4), 4, 8, np.array(loads, float))
    ref = spread_copies(ref, np.array(loads, float)) if form == "vllm-ascend" else ref
    np.testing.assert_array_equal(found.experts, ref.experts)


def test_a_name_that_the_engine_does_not_load_is_refused_before_anything_is_written(tmp_path, capsys):
    for form in ("sglang", "vllm-ascend"):
        words = [*EXPORT, "--placement", "linear", "--format", form, "--out", tmp_path / "map"]
        fails(capsys, words, f"the name must end in .json, or {form} does not load it")
    assert not list(tmp_path.iterdir())


def test_export_of_static_placements_and_conversion(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.json"
    words = [*EXPORT, "--placement", "round_robin", "--layers", "2", "--format", "trtllm", "--first-layer", "3"]
    assert run(*words, "--out", a) == 0
    assert a.read_text().splitlines()[2].startswith("  3: [0, 4, 8, 12")
    assert run(*EXPORT, "--placement", f"file:{a}", "--format", "sglang", "--out", b) == 0
    rows = json.loads(b.read_text())["physical_to_logical_map"]
    assert len(rows) == 24  # a row for each decoder layer; the engine's start where the map has none
    assert rows[3:5] == [[r + 4 * i for r in range(4) for i in range(8)]] * 2
    assert rows[:3] + rows[5:] == [list(range(32))] * 22
    assert run(*EXPORT, "--placement", "linear", "--format", "vllm", "--out", b) == 0
    assert len(json.loads(b.read_text())["physical_to_logical_map"]) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--placement", "eplb+4"], "needs --fit-on FILE"),
        (["--placement", "eplb+4", "--fit-on", "absent.npz"], "does not exist"),
        (["--placement", "eplb+3", "--fit-on", "TRACE"], "do not divide by 4 ranks"),
        (["--placement", "eplb", "--fit-on", "TRACE", "--layers", "3"], "goes with placements that are not fitted"),
        (["--placement", "eplb", "--fit-on", "TRACE", "--model", "olmoe-1b-7b"], "4 experts per token, model olmoe"),
        (["--placement", "eplb", "--fit-on", "TRACE", "--model", "mixtral-8x7b"], "has top_k 2"),
        (["--placement", "linear", "--fit-on", "TRACE"], "--fit-on goes with a load-aware placement"),
        (["--placement", "linear", "--ep", "5"], "ranks hold from 6 to 7"),
        (["--placement", "random"], "there is none to export"),
        (["--placement", "linear", "--format", "vlm"], "did you mean vllm"),
        (["--placement", "linear", "--first-layer", "3"], "vllm does not name layers"),
        (["--placement", "linear", "--out", "."], "is a folder"),
    ],
)
def test_bad_exports_are_one_line_and_leave_nothing(trace, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [trace if word == "TRACE" else word for word in words]
    out = [] if "--out" in words else ["--out", "empty/out"]
    form = [] if "--format" in words else ["--format", "vllm"]
    fails(capsys, [*EXPORT, *words, *form, *out], "epsim export: error: ", message)
    assert not list((tmp_path / "empty").iterdir())


def test_a_pipe_or_a_device_is_not_replaced_and_a_failed_write_is_status_1(tmp_path, capsys):
    """A rename would put a file in its place."""
    pipe, words = tmp_path / "pipe.json", [*EXPORT, "--placement", "linear", "--format", "vllm", "--out"]
    os.mkfifo(pipe)
    fails(capsys, [*words, pipe], "is not a regular file: it would be replaced")
    assert pipe.is_fifo()
    fails(capsys, [*words, "/proc/epsim/x"], "cannot write", status=1)


@pytest.fixture
def cases(shared):
    return shared / "cases"


def export(cases, tmp_path, form, *words):
    out = tmp_path / f"map.{form}.json"
    assert run("export", "--format", form, "--out", out, *words) == 0
    return out


def sweep_of_map(path, cases, tmp_path):
    words = ["sweep", "--model", cases / "small-model.json", "--workload", "uniform", "--ep", 4, "--tokens", 4]
    assert run(*words, "--trials", 10, "--placement", f"file:{path}", "--out", tmp_path / "out") == 0


def test_case_d14_a_hot_expert_has_two_copies_on_a_rank_and_the_report_says_so(cases, tmp_path, capsys):
    words = ["--model", cases / "small-model.json", "--placement", "eplb+4", "--ep", "4"]
    words += ["--fit-on", cases / "d14-hot-expert.csv"]
    out = export(cases, tmp_path, "sglang", *words)
    rows = json.loads(out.read_text())["physical_to_logical_map"]
    ref = place("eplb+4", plain(8), 4, loads=[1000] + 7 * [1]).logical_of_slot.tolist()
    assert rows == [ref] * 3
    note = "a rank holds two copies of one expert in 3 of 3 layers; they balance nothing (3 of 36 slots)"
    assert note in capsys.readouterr().err
    ascend = json.loads(export(cases, tmp_path, "vllm-ascend", *words).read_text())
    assert "moved in 3 of 3 layers" in capsys.readouterr().err
    for row in ascend["layer_list"]:
        held = [device["device_expert"] for device in row["device_list"]]
        assert all(len(set(experts)) == 3 for experts in held)
        assert sum(experts.count(0) for experts in held) == 4


def test_case_d13_a_trtllm_file_without_assignments_is_the_engines_start(cases, tmp_path, capsys):
    sweep_of_map(cases / "d13-trtllm-online.yaml", cases, tmp_path)
    assert "no initial_global_assignments" in capsys.readouterr().err
    found = place(f"file:{cases / 'd13-trtllm-online.yaml'}", cases / "small-model.json", 4)
    assert found.logical_of_slot.tolist() == [(r * 8 // 4 + s) % 8 for r in range(4) for s in range(3)]


def test_case_m01_a_draft_layer_is_left_out_with_a_note(cases, tmp_path, capsys):
    sweep_of_map(cases / "m01-map-of-4-layers.json", cases, tmp_path)
    assert "layers past the 3 decoder layers" in capsys.readouterr().err


def test_case_e01_rows_are_decoder_layers_for_sglang_and_keys_for_tensorrt_llm(cases, tmp_path):
    model = load_model(cases / "e01-one-dense-layer.json")
    words = ["--model", cases / "e01-one-dense-layer.json", "--placement", "eplb", "--ep", "4"]
    words += ["--fit-on", cases / "e01-counts.csv"]
    counts = np.loadtxt(cases / "e01-counts.csv", delimiter=",")
    ref = [place("eplb", model, 4, loads=row).logical_of_slot.tolist() for row in counts[1:]]
    rows = json.loads(export(cases, tmp_path, "sglang", *words).read_text())["physical_to_logical_map"]
    assert rows[1:] == ref
    assert sorted(rows[0]) == list(range(8))
    lines = export(cases, tmp_path, "trtllm", *words).read_text().splitlines()
    assert lines[2:5] == [f"  {layer}: {row}" for layer, row in zip((1, 2, 3), ref, strict=True)]


@pytest.mark.parametrize("form", ["vllm", "vllm-ascend"])
def test_an_engine_that_takes_layers_by_their_place_gets_no_map_of_some_in_between(cases, tmp_path, capsys, form):
    words = [
        "export",
        "--model",
        cases / "e01-one-dense-layer.json",
        "--placement",
        "eplb",
        "--ep",
        "4",
        "--format",
        form,
    ]
    loads = tmp_path / "x.csv"
    for first, message in ((1, ""), (2, "layers 2 to 3 alone would go to layers 1 to 2")):
        loads.write_text("layer,0,1,2,3,4,5,6,7\n" + "".join(f"{first + i},8,7,6,5,4,3,2,1\n" for i in (0, 1)))
        command = [*words, "--fit-on", loads, "--out", tmp_path / f"{first}.json"]
        if message:
            fails(capsys, command, message)
        else:
            assert run(*command) == 0


def test_first_layer_places_the_layers_of_a_model_that_does_not_know_its_own(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"num_local_experts": 8, "num_experts_per_tok": 2}')
    words = ["--model", config, "--placement", "round_robin", "--ep", "4", "--layers", "2", "--first-layer", "3"]
    out = tmp_path / "map.json"
    assert run("export", *words, "--format", "sglang", "--out", out) == 0
    rows = json.loads(out.read_text())["physical_to_logical_map"]
    assert rows == [list(range(8))] * 3 + [[0, 4, 1, 5, 2, 6, 3, 7]] * 2
    assert run("export", *words, "--format", "trtllm", "--out", out) == 0
    assert [line.split(":")[0] for line in out.read_text().splitlines()[2:4]] == ["  3", "  4"]


def test_a_report_ends_with_the_flag_that_loads_the_file_and_when_it_is_ignored(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for form, says in (
        ("vllm", "needs patched code. What can be turned on instead: --enable-eplb"),  # no groups: no round_robin
        ("sglang", "--init-expert-location map.json --ep-num-redundant-experts 4."),
        ("trtllm", "ignores the file in silence unless the architecture is on its list"),
        ("trtllm", "With MTP it stops at the draft layer"),
        ("vllm-ascend", '"expert_map_path": "map.json"'),
    ):
        words = ["export", "--model", "mixtral-8x7b", "--placement", "linear+4", "--ep", "4", "--format", form]
        assert run(*words, "--out", "map.json") == 0
        assert says in capsys.readouterr().out.splitlines()[-1]
