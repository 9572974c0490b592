"""Files of serving engines: written, read back, refused when damaged."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import InputError, ModelSpec, place
from sim.cli import main
from sim.placement import FORMATS, Placement, placement_text, read_placement


def plain(n_experts):
    return ModelSpec("plain", n_experts, 1)


def random_slots(seed, n_layers, n_experts, ep_size, n_slots):
    rng = np.random.default_rng(seed)
    rows = [
        np.concatenate([np.arange(n_experts), rng.integers(0, n_experts, n_slots - n_experts)]) for _ in range(n_layers)
    ]
    return Placement.of_slots("file", ep_size, n_experts, np.array([rng.permutation(row) for row in rows], np.int16))


@given(st.integers(0, 2**32 - 1), st.sampled_from(FORMATS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 60))
def test_what_is_written_is_read_back(tmp_path_factory, seed, form, n_layers, ep_size, first_layer):
    slots = random_slots(seed, n_layers, 7, ep_size, 3 * ep_size + 10 - 10 % ep_size)
    path = tmp_path_factory.mktemp("x") / "map"
    path.write_text(placement_text(slots, form, ep_size, first_layer))
    found = read_placement(path, 7, ep_size)
    np.testing.assert_array_equal(found.experts, slots.experts)
    np.testing.assert_array_equal(found.ranks, slots.ranks)


def test_the_formats_are_as_the_engines_have_them():
    slots = Placement.of_slots("file", 2, 3, np.array([[0, 1, 2, 0], [2, 1, 0, 1]], np.int16))
    vllm = json.loads(placement_text(slots, "vllm", 2))
    assert (
        vllm
        == {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}
        == json.loads(placement_text(slots, "sglang", 2))
    )
    assert placement_text(slots, "trtllm", 2, 3) == (
        "num_slots: 4\ninitial_global_assignments:\n  3: [0, 1, 2, 0]\n  4: [2, 1, 0, 1]\nlayer_updates_per_iter: 0\n"
    )
    ascend = json.loads(placement_text(slots, "vllm-ascend", 2, 3))
    assert ascend["moe_layer_count"] == 2
    assert ascend["layer_list"][1] == {
        "layer_id": 4,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [2, 1]}, {"device_id": 1, "device_expert": [0, 1]}],
    }


YAML = """# a comment
---
num_slots: 4   # slots
initial_global_assignments:
  11:
  - 2
  - 1
  - 0
  - 1
  '3': [0, 1,
        2, 0]
layer_updates_per_iter: 0
"""


def test_yaml_in_block_and_flow_style(tmp_path):
    path = tmp_path / "lb.yaml"
    path.write_text(YAML)
    found = read_placement(path, 3, 2)
    assert found.experts.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]
    assert place(f"file:{path}", plain(3), 2).logical_of_slot.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]


MAP = '{"physical_to_logical_map": %s}'
ASCEND = (
    '{"moe_layer_count": %s, "layer_list": [{"layer_id": 0, "device_count": %s, "device_list": '
    '[{"device_id": 0, "device_expert": %s}, {"device_id": %s, "device_expert": [2, 0]}]}]}'
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MAP % "[[0, 1, 2, 0], [0, 1, 2]]", "layer 1 has 3 slots, the first layer has 4"),
        (MAP % "[[0, 1, 2]]", "its 3 slots must be from the model's 3 experts to 32771, and divide by --ep 2"),
        (MAP % "[[0, 1, 1, 0]]", "layer 0: expert 2 of the model's 3 has no slot"),
        (MAP % "[[0, 1, 2, 3]]", "layer 0: slot 3 must have an expert from 0 to 2, not 3"),
        (MAP % "[[0, 1, 2, -1]]", "not -1"),
        (MAP % "[[0, 1, 2, NaN]]", "not nan"),
        (MAP % "[[0, 1, 2, 1.0]]", "not 1.0"),
        (MAP % "[[0, 1, 2, true]]", "not True"),
        (MAP % "[]", "must be a list of layers"),
        (MAP % "[3]", "layer 0 must be a list, not 3"),
        (MAP % "{}", "must be a list of layers"),
        (MAP % "[[0, 1, 2, 0]", "is not JSON"),
        (ASCEND % (2, 2, "[0, 1]", 1), "as many layers as moe_layer_count says"),
        (ASCEND % (1, 4, "[0, 1]", 1), "must have the devices 0 to 1 of --ep 2"),
        (ASCEND % (1, 2, "[0, 1]", 2), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "[0, 1]", 0), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "[0, 1]", '"1"'), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "[0, 1]", "[1]"), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "3", 1), "each with its device_expert"),
        (ASCEND % (1, 2, "[0, 1, 2]", 1), "devices hold different numbers"),
        ('{"layer_list": []}', "at least one"),
        ('{"moe_layer_count": 1, "layer_list": [3]}', "needs a layer_id of its own"),
        ('{"logical_count": [[1, 2, 3]]}', "physical_to_logical_map"),
        (YAML.replace("num_slots: 4 ", "num_slots: 5 "), "num_slots = 5 slots; layer 11 has 4"),
        (YAML.replace("num_slots: 4 ", "slots: 4 "), "has no num_slots"),
        (YAML.replace("  - 2", "  - 1"), "layer 11: expert 2 of the model's 3 has no slot"),
        (YAML.replace("  - 2", "  - x"), "line 6: expected a whole number, not x"),
        (YAML.replace("  - 2", "  - &a 2"), "line 6: expected 'key: value'"),
        (YAML.replace("2, 0]", "2, 0"), "a list is not closed"),
        (YAML.replace("2, 0]", "2, , 0]"), "expected a whole number"),
        (YAML.replace("'3'", "11"), "layer 11 is out of place, there twice"),
        (YAML.replace("'3': [", "'3': !!python/object ["), "expected a list of experts"),
        (MAP % f"[{[0, 1, 2, 0] * 9000}]", "its 36000 slots must be from the model's 3 experts to 32771"),
        ("num_slots: 4\ninitial_global_assignments:\n", "there is none"),
        ("initial_global_assignments: {3: [0, 1, 2, 0]}\n", "expected a line 'layer: [experts]'"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "map"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        read_placement(path, 3, 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_huge_and_binary_files(tmp_path, monkeypatch):
    path = tmp_path / "map"
    path.write_bytes(b"\x80\x04\x95")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_placement(path, 3, 2)
    monkeypatch.setattr("sim.files.MAX_BYTES", 10)
    path.write_text(MAP % "[[0, 1, 2, 0]]")
    with pytest.raises(InputError, match="is larger than"):
        read_placement(path, 3, 2)


@pytest.fixture
def trace(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(32)[:4] for _ in range(300)], np.int16).reshape(100, 3, 4)
    np.savez(tmp_path / "trace.npz", topk_ids=ids, sequence_lengths=np.full(20, 5))
    return tmp_path / "trace.npz"


EXPORT = ["export", "--model", "gpt-oss-20b", "--ep", "4"]


@pytest.mark.parametrize("form", FORMATS)
def test_export(trace, tmp_path, capsys, form):
    out = tmp_path / "out"
    assert main([*EXPORT, "--placement", "eplb+4", "--traffic", str(trace), "--format", form, "--out", str(out)]) == 0
    assert "3 layers x 36 slots on 4 ranks" in capsys.readouterr().out
    with np.load(trace) as arrays:
        loads = [np.bincount(layer.ravel(), minlength=32) for layer in arrays["topk_ids"].transpose(1, 0, 2)]
    found = read_placement(out, 32, 4)
    for layer, row in enumerate(loads):
        ref = place("eplb", ModelSpec("x", 32, 4), 4, loads=row, redundant=4)
        np.testing.assert_array_equal(found.experts[layer], ref.logical_of_slot)


def test_export_of_static_placements_and_conversion(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.json"
    words = [*EXPORT, "--placement", "round_robin", "--layers", "2", "--format", "trtllm", "--first-layer", "3"]
    assert main([*words, "--out", str(a)]) == 0
    assert a.read_text().splitlines()[2].startswith("  3: [0, 4, 8, 12")
    assert main([*EXPORT, "--placement", f"file:{a}", "--format", "sglang", "--out", str(b)]) == 0
    rows = json.loads(b.read_text())["physical_to_logical_map"]
    assert rows == [[r + 4 * i for r in range(4) for i in range(8)]] * 2
    assert main([*EXPORT, "--placement", "linear", "--format", "vllm", "--out", str(b)]) == 0
    assert len(json.loads(b.read_text())["physical_to_logical_map"]) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--placement", "eplb+4"], "needs --traffic FILE"),
        (["--placement", "eplb+4", "--traffic", "absent.npz"], "does not exist"),
        (["--placement", "eplb+3", "--traffic", "TRACE"], "do not divide by 4 ranks"),
        (
            ["--placement", "eplb", "--traffic", "TRACE", "--layers", "3"],
            "--layers goes with placements that are not fitted",
        ),
        (
            ["--placement", "eplb", "--traffic", "TRACE", "--model", "olmoe-1b-7b"],
            "4 experts per token, model olmoe-1b-7b",
        ),
        (["--placement", "eplb", "--traffic", "TRACE", "--model", "mixtral-8x7b"], "has top_k 2"),
        (["--placement", "linear", "--traffic", "TRACE"], "--traffic goes with a load-aware placement"),
        (["--placement", "linear", "--ep", "5"], "ranks hold from 6 to 7"),
        (["--placement", "linear", "--layers", "0"], "--layers 0"),
        (["--placement", "random"], "there is none to export"),
        (["--placement", "linear", "--format", "vlm"], "did you mean vllm"),
        (["--placement", "linear", "--first-layer", "3"], "vllm does not name layers"),
        (["--placement", "linear", "--first-layer", "-1", "--format", "trtllm"], "--first-layer -1"),
        (["--placement", "linear", "--out", "."], "is a folder"),
        (["--placement", "linear", "--ranks-per-node", "0"], "--ranks-per-node 0"),
    ],
)
def test_bad_exports_are_one_line_and_leave_nothing(trace, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [str(trace) if word == "TRACE" else word for word in words]
    out = [] if "--out" in words else ["--out", "empty/out"]
    form = [] if "--format" in words else ["--format", "vllm"]
    status = main([*EXPORT, *words, *form, *out])
    assert status == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("epsim export: error: ")
    assert message in line
    assert not list((tmp_path / "empty").iterdir())


def test_a_pipe_or_a_device_is_not_replaced(tmp_path, capsys):
    """A rename would put a file in its place."""
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert main([*EXPORT, "--placement", "linear", "--format", "vllm", "--out", str(pipe)]) == 2
    assert "is not a regular file: it would be replaced" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_a_list_over_many_lines_is_read_in_one_pass(tmp_path):
    """200,000 lines took minutes where each was joined to all before it."""
    path = tmp_path / "map"
    path.write_text("num_slots: 3\ninitial_global_assignments:\n 0: [\n" + "1,\n" * 200_000 + "]\n")
    with pytest.raises(InputError, match="num_slots = 3 slots; layer 0 has 200000"):
        read_placement(path, 3, 1)


def test_a_failed_write_is_status_1(tmp_path, capsys):
    words = [*EXPORT, "--placement", "linear", "--format", "vllm", "--out", "/proc/epsim/x"]
    assert main(words) == 1
    assert "cannot write" in capsys.readouterr().err


def test_an_exported_map_scores_as_the_placement_itself_in_every_format(trace, tmp_path, capsys):
    """Fitted on one record, scored on another: the strategy and its map, through each engine's format and back."""
    ids = np.load(trace)["topk_ids"]
    other = tmp_path / "other.npz"
    np.savez(other, topk_ids=ids[::-1], sequence_lengths=np.load(trace)["sequence_lengths"][::-1])
    names = []
    for form in FORMATS:
        path = tmp_path / f"map.{form}"
        words = ["export", "--model", "gpt-oss-20b", "--placement", "eplb+4", "--ep", "4", "--traffic", str(trace)]
        assert main([*words, "--format", form, "--out", str(path)]) == 0
        names.append(f"file:{path}")
    words = ["sweep", "--model", "gpt-oss-20b", "--workload", f"file:{other}", "--fit-on", str(trace), "--ep", "4"]
    words += ["--tokens", "8", "--trials", "60", "--placement", ",".join(["linear", "eplb+4", *names])]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("placement")
    scores = [name for name in summary.columns if name not in ("cell_id", "stopped")]
    for name in names:
        pd.testing.assert_series_equal(summary.loc[name, scores], summary.loc["eplb+4", scores], check_names=False)
    assert summary.imbalance_mean["eplb+4"] != summary.imbalance_mean["linear"]
