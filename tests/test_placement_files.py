"""Files of serving engines: written, read back, refused when damaged."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import plain
from hypothesis import given
from hypothesis import strategies as st

from sim import InputError, ModelSpec, load_model, place
from sim.placement import FORMATS, Placement, notes_on, place_balanced, placement_text, read_placement, spread_copies


def layered(n_experts, moe_layer_ids, n_layers):
    return ModelSpec("layered", n_experts, 1, moe_layer_ids=moe_layer_ids, n_layers=n_layers)


def random_slots(seed, n_layers, n_experts, ep_size, n_slots):
    rng = np.random.default_rng(seed)
    rows = [
        np.concatenate([np.arange(n_experts), rng.integers(0, n_experts, n_slots - n_experts)]) for _ in range(n_layers)
    ]
    return Placement.of_slots("file", ep_size, n_experts, np.array([rng.permutation(row) for row in rows], np.int16))


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(FORMATS),
    st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True), st.integers(1, 5), st.integers(0, 3),
)  # fmt: skip
def test_what_is_written_is_read_back_as_the_layers_of_the_model(tmp_path_factory, seed, form, ids, ep_size, more):
    model = layered(7, tuple(sorted(ids)), max(ids) + 1 + more)
    slots = random_slots(seed, len(ids), 7, ep_size, 7 + -7 % ep_size).for_layers(model.moe_layer_ids)
    path = tmp_path_factory.mktemp("x") / "map"
    if form == "vllm-ascend" and slots.idle_copies.any():
        with pytest.raises(InputError, match="a rank holds an expert twice"):
            placement_text(slots, form)
        return
    path.write_text(placement_text(slots, form, model.n_layers))
    found = read_placement(path, model, ep_size)
    np.testing.assert_array_equal(found.experts, slots.experts)
    assert found.layer_ids == (
        model.moe_layer_ids if found.n_rows > 1 or (model.n_layers > 1 and form == "sglang") else None
    )
    of_decoder = form != "vllm" or len(ids) == 1 or model.moe_layer_ids == tuple(range(len(ids)))
    assert bool(found.notes) != of_decoder


def test_the_formats_are_as_the_engines_have_them():
    slots = Placement.of_slots("file", 2, 3, np.array([[0, 1, 2, 0], [2, 1, 0, 1]], np.int16))
    named = slots.for_layers((1, 3))
    vllm = json.loads(placement_text(named, "vllm"))
    assert vllm == {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}
    assert json.loads(placement_text(slots, "sglang")) == vllm
    assert json.loads(placement_text(named, "sglang", 5)) == {
        "physical_to_logical_map": [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1], [0, 1, 2, 0]]
    }
    assert placement_text(named, "trtllm") == (
        "num_slots: 4\ninitial_global_assignments:\n  1: [0, 1, 2, 0]\n  3: [2, 1, 0, 1]\nlayer_updates_per_iter: 0\n"
    )
    ascend = json.loads(placement_text(named, "vllm-ascend"))
    assert ascend["moe_layer_count"] == 2
    assert ascend["layer_list"][1] == {
        "layer_id": 3,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [2, 1]}, {"device_id": 1, "device_expert": [0, 1]}],
    }


V3_LAYERS = tuple(range(3, 61))  # of 61


@pytest.fixture(scope="module")
def v3_map():
    loads = np.random.default_rng(11).lognormal(0, 0.65, (58, 256))
    return place_balanced("eplb+32", load_model("deepseek-v3"), 32, 8, loads, V3_LAYERS), loads


def test_sglang_finds_58_of_58_layers_of_v3_where_it_looks(v3_map):
    """SGLang 0.5.23: a token of decoder layer L goes to a slot of logical_to_all_physical_map[L], which has a row for each row
    of the file; DeepSeek's model code passes its decoder layer id (expert_location.py, expert_location_dispatch.py)."""
    placement, _ = v3_map
    rows = json.loads(placement_text(placement, "sglang", 61))["physical_to_logical_map"]
    assert len(rows) == 61  # num_hidden_layers, which _compute_logical_to_all_physical_map is made for
    slots_of = [{e: [s for s, expert in enumerate(row) if expert == e] for e in range(256)} for row in rows]
    right = 0
    for i, layer in enumerate(V3_LAYERS):
        wanted = placement.experts[i].tolist()
        right += all(wanted[s] == e for e in range(256) for s in slots_of[layer][e]) and wanted == rows[layer]
    assert right == 58
    assert all(len(slots) >= 1 for of_layer in slots_of for slots in of_layer.values())  # dense layers too


def test_tensorrt_llm_finds_58_of_58_layers_of_v3_where_it_looks(v3_map):
    """MoeLoadBalancerConfig: a layer's row is initial_global_assignments[layer_idx], of num_slots slots and with every expert;
    slot s is on rank s // (num_slots / ep_size)."""
    placement, _ = v3_map
    text = placement_text(placement, "trtllm")
    of_layer = {
        int(key): json.loads(row)
        for key, row in (line.split(": ", 1) for line in text.splitlines() if line[:2] == "  ")
    }
    assert sorted(of_layer) == list(V3_LAYERS)
    right = sum(
        of_layer[layer] == placement.experts[i].tolist() and set(of_layer[layer]) == set(range(256))
        for i, layer in enumerate(V3_LAYERS)
    )
    assert right == 58


def test_vllm_ascend_finds_58_of_58_layers_of_v3_and_all_slots(v3_map):
    """vllm-ascend, eplb_utils.py: MoE layer i is layer_list[i]; an expert's place on a rank is its last place in device_expert,
    and its physical id rank * (distinct experts of rank 0) + place."""
    placement, loads = v3_map
    assert placement.idle_copies.any()  # as EPLB has it, 1 layer or more would go wrong
    with pytest.raises(InputError, match="counts distinct experts as slots"):
        placement_text(placement, "vllm-ascend")
    moved = spread_copies(placement, loads)
    layer_list = json.loads(placement_text(moved, "vllm-ascend"))["layer_list"]
    assert [row["layer_id"] for row in layer_list] == list(V3_LAYERS)
    for i, row in enumerate(layer_list):
        held = [device["device_expert"] for device in row["device_list"]]
        slots_of_rank_0 = len(set(held[0]))
        for rank, experts in enumerate(held):
            place = {e: p for p, e in enumerate(experts)}
            assert all(moved.experts[i][rank * slots_of_rank_0 + p] == e for e, p in place.items())


def test_copies_that_shared_a_rank_are_moved_and_no_rank_gets_heavier(v3_map):
    def heaviest(placement):
        copies = np.array([np.bincount(row, minlength=256) for row in placement.experts])
        share = np.take_along_axis(loads / copies, placement.experts.astype(int), axis=1)
        return share.reshape(58, 32, 9).sum(axis=2).max(axis=1)

    placement, loads = v3_map
    moved = spread_copies(placement, loads)
    assert not moved.idle_copies.any()
    assert (heaviest(moved) <= heaviest(placement) * (1 + 1e-9)).all()
    untouched = placement.idle_copies == 0
    np.testing.assert_array_equal(moved.experts[untouched], placement.experts[untouched])
    assert all(set(row) == set(range(256)) for row in moved.experts.tolist())


def test_a_copy_that_cannot_move_is_refused():
    slots = Placement.of_slots("eplb+2", 2, 2, np.array([[0, 0, 1, 1]], np.int16))
    moved = spread_copies(slots, np.array([[3.0, 1.0]]))
    assert moved.experts.tolist() in ([[0, 1, 0, 1]], [[1, 0, 0, 1]], [[0, 1, 1, 0]], [[1, 0, 1, 0]])
    with pytest.raises(InputError, match="layer 0 holds two copies of one expert, and none can move"):
        spread_copies(Placement.of_slots("eplb+4", 2, 2, np.array([[0, 0, 1, 1, 1, 0]], np.int16)), np.ones((1, 2)))


MAPS = {
    "sglang": lambda ids, rows: json.dumps({"physical_to_logical_map": rows}),
    "trtllm": lambda ids, rows: (
        "num_slots: 4\ninitial_global_assignments:\n"
        + "".join(f"  {i}: {row}\n" for i, row in zip(ids, rows, strict=True))
    ),
    "vllm-ascend": lambda ids, rows: json.dumps(
        {
            "moe_layer_count": len(rows),
            "layer_list": [
                {
                    "layer_id": i,
                    "device_count": 2,
                    "device_list": [{"device_id": r, "device_expert": row[2 * r : 2 * r + 2]} for r in range(2)],
                }
                for i, row in zip(ids, rows, strict=True)
            ],
        }
    ),
    "ranks": lambda ids, rows: json.dumps(
        [[s // 2 for _, s in sorted((e, s) for s, e in enumerate(row))] for row in rows]
    ),
}
DRAFT = "layers past the 4 decoder layers of layered are left out (a draft model's?): [4]"
OTHER = "has layers past the 8 decoder layers of layered: [8, 9, 10, 11, 12]; another model's map?"
ROWS = [[3, 2, 1, 0], [0, 1, 2, 3], [1, 0, 3, 2], [0, 2, 1, 3], [2, 0, 1, 3]]


@pytest.mark.parametrize(
    ("form", "ids", "wanted", "note"),
    [
        ("sglang", range(4), [1, 3], ""),  # decoder layers of a model whose layers 1 and 3 have experts
        (
            "sglang",
            range(2),
            [0, 1],
            "SGLang takes row i for decoder layer i",
        ),  # as many as MoE layers, as vLLM has them
        ("sglang", range(5), [1, 3], DRAFT),
        ("sglang", range(3), None, "has 3 layers; layered has 4 decoder layers, 2 of them with experts"),
        ("ranks", range(4), [1, 3], ""),
        ("trtllm", [1, 3], [0, 1], ""),
        ("trtllm", [0, 1, 2, 3], [1, 3], ""),
        ("trtllm", [1, 3, 4], [0, 1], DRAFT),
        ("trtllm", [0, 1], [0, 1], "layers 0 to 1 taken for the MoE layers in order; TensorRT-LLM looks for 1 to 3"),
        ("trtllm", [0, 1, 2], None, "the 2 MoE layers of layered are 1 to 3, and 3 is not there"),
        ("vllm-ascend", [1, 3], [0, 1], ""),
        ("vllm-ascend", [0, 1], [0, 1], ""),
        ("vllm-ascend", [0, 1, 2], [0, 1], DRAFT),
    ],
)
def test_rows_of_a_file_become_the_layers_that_the_engine_takes_them_for(tmp_path, form, ids, wanted, note):
    model = layered(4, (1, 3), 4)
    path = tmp_path / "map"
    path.write_text(MAPS[form](list(ids), ROWS[: len(ids)]))
    if wanted is None:
        with pytest.raises(InputError, match=note):
            read_placement(path, model, 2)
        return
    found = read_placement(path, model, 2)
    assert found.layer_ids == (1, 3)
    if form == "ranks":
        assert found.expert_ranks.tolist() == [[ROWS[i].index(e) // 2 for e in range(4)] for i in wanted]
    else:
        assert found.experts.tolist() == [ROWS[i] for i in wanted]
    assert note in " ".join(found.notes)
    assert bool(note) == bool(found.notes)
    assert notes_on(found) == [f"file:{path}: {text}" for text in found.notes]


def test_a_map_of_other_layers_than_the_models_is_not_taken_in_silence(tmp_path):
    model = layered(4, tuple(range(8)), 8)
    path = tmp_path / "map"
    for form, n_rows, message in (
        *((form, 13, OTHER) for form in ("sglang", "ranks", "trtllm", "vllm-ascend")),
        *((form, 1, "one layer is taken for all 8 MoE layers of layered") for form in MAPS),
        ("trtllm", 1, "TensorRT-LLM stops at layer 1, which is not there"),
        ("sglang", 3, "3 layers for the 8 MoE layers of layered: taken in turn"),
        ("trtllm", 3, "taken in turn; TensorRT-LLM stops at layer 3, which is not there"),
        ("vllm-ascend", 3, "3 layers for the 8 MoE layers of layered: taken in turn"),
    ):
        path.write_text(MAPS[form](list(range(n_rows)), ROWS[:1] * n_rows))
        if n_rows > 8:
            with pytest.raises(InputError, match=re.escape(message)):
                read_placement(path, model, 2)
        else:
            assert message in " ".join(read_placement(path, model, 2).notes)


def test_tensorrt_llms_start_without_assignments(tmp_path):
    """fused_moe/interface.py: expert (rank * num_experts // ep_size + local slot) % num_experts."""
    path = tmp_path / "online.yaml"
    none = ("num_slots: 12\n", "num_slots: 12\ninitial_global_assignments: null\n", '{"num_slots": 12}')
    for text in none:
        path.write_text(text)
        found = read_placement(path, plain(8), 4)
        assert found.experts.tolist() == [[0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0]]
        assert "no initial_global_assignments" in found.notes[0]
    with pytest.raises(InputError, match="num_slots 12 does not divide by `ep_size` 5"):
        read_placement(path, plain(8), 5)
    with pytest.raises(InputError, match="its 12 slots must be from the model's 16 experts"):
        read_placement(path, plain(16), 4)


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
    found = read_placement(path, plain(3), 2)
    assert found.experts.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]
    assert place(f"file:{path}", plain(3), 2).logical_of_slot.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]
    shared = (
        "initial_global_assignments:\n  0: &id001\n  - 0\n  - 1\n  1: *id001\nlayer_updates_per_iter: 2\nnum_slots: 2\n"
    )
    path.write_text(shared)  # PyYAML, of a list that two layers share
    found = read_placement(path, plain(2), 2)
    assert found.experts.tolist() == [[0, 1], [0, 1]]
    assert "moves experts as it runs" in found.notes[0]
    flow = "{11: [2, 1, 0, 1],\n '3': [0, 1, 2, 0,]}"
    for text in (
        f"num_slots: 4\ninitial_global_assignments: {flow}\n",
        f"{{initial_global_assignments: {flow}, num_slots: 4}}",
    ):
        path.write_text(text)
        assert read_placement(path, plain(3), 2).experts.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]


def test_vllm_ascend_takes_devices_in_the_order_of_the_list_and_says_what_goes_wrong(tmp_path):
    """`expert_file_to_tensor` (eplb/core/eplb_utils.py, vllm-ascend 0.23): rank r is place r, and layer i place i, whatever
    their ids, which need not be there."""
    path = tmp_path / "map.json"
    content = json.loads(MAPS["vllm-ascend"]([5, 3], ROWS[:2]))
    for in_order in (False, True):
        path.write_text(json.dumps(content))
        found = read_placement(path, replace(plain(4), n_moe_layers=2), 2)
        assert found.experts.tolist() == ROWS[:2]
        assert bool(found.notes) != in_order
        for layer in content["layer_list"]:
            layer["device_list"] = [{"device_expert": device["device_expert"]} for device in layer["device_list"]]
        content["layer_list"] = [{"device_list": layer["device_list"]} for layer in content["layer_list"]]
    content = json.loads(MAPS["vllm-ascend"]([0], ROWS[:1]))
    content["layer_list"][0]["device_list"].reverse()
    path.write_text(json.dumps(content))
    found = read_placement(path, plain(4), 2)
    assert found.experts.tolist() == [[1, 0, 3, 2]]
    assert "in the order of the list" in found.notes[0]
    path.write_text(MAPS["vllm-ascend"]([0], [[0, 0, 1, 0]]))
    assert "holds an expert twice" in read_placement(path, plain(2), 2).notes[0]
    for n_moe, told in ((2, "starts as without a file"), (3, "(Invalid EPLB Table): the file needs all 3")):
        model = replace(plain(2), n_layers=n_moe, n_moe_layers=n_moe, moe_layer_ids=tuple(range(n_moe)))
        assert any(note.endswith(told) for note in read_placement(path, model, 2).notes)


def test_a_map_in_a_torch_file_is_that_of_sglang(tmp_path, monkeypatch):
    """`compute_initial_expert_location_metadata` loads .pt, too; here with a stand-in for torch."""
    held = {"physical_to_logical_map": np.array(ROWS[:2])}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=lambda *_, **__: held))
    path = tmp_path / "map.pt"
    path.write_bytes(b"x")
    assert read_placement(path, plain(4), 2).experts.tolist() == ROWS[:2]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="or save the map as JSON"):
        read_placement(path, plain(4), 2)


MAP = '{"physical_to_logical_map": %s}'
ASCEND = (
    '{"moe_layer_count": %s, "layer_list": [{"layer_id": 0, "device_count": %s, "device_list": '
    '[{"device_id": 0, "device_expert": %s}, {"device_id": %s, "device_expert": [2, 0]}]}]}'
)


def test_bad_files(tmp_path):
    path = tmp_path / "map"
    for content, message in (
        (MAP % "[[0, 1, 2, 0], [0, 1, 2]]", "layer 1 has 3 slots, the first layer has 4"),
        (MAP % "[[0, 1, 2]]", "its 3 slots must be from the model's 3 experts to 32771, and divide by `ep_size` 2"),
        (MAP % "[[0, 1, 1, 0]]", "layer 0: expert 2 of the model's 3 has no slot"),
        (MAP % "[[0, 1, 2, 3]]", "layer 0: slot 3 must have an expert from 0 to 2, not 3"),
        (MAP % "[[0, 1, 2, -1]]", "not -1"),
        (MAP % "[[0, 1, 2, 1.0]]", "not 1.0"),
        (MAP % "[[0, 1, 2, true]]", "not True"),
        (MAP % "[]", "must be a list of layers"),
        (MAP % "[0, 1, 2, 0]", "must be a list of layers, each a list of experts"),
        (MAP % "[[0, 1, 2, 0]", "is not JSON"),
        (ASCEND % (2, 2, "[0, 1]", 1), "as many layers as moe_layer_count says"),
        (ASCEND % (1, 4, "[0, 1]", 1), "must have the devices 0 to 1 of `ep_size` 2"),
        (ASCEND % (1, 2, "[0, 1]", 2), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "[0, 1]", 0), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "[0, 1]", "[1]"), "must have the devices 0 to 1"),
        (ASCEND % (1, 2, "3", 1), "each device must have a device_expert, a list"),
        (ASCEND % (1, 2, "[0, 1, 2]", 1), "a list of equally many experts"),
        (ASCEND % ("true", 2, "[0, 1]", 1), "as many layers as moe_layer_count says"),
        (ASCEND % (1, 2, "[0, true]", 1), "not True"),
        ('{"layer_list": []}', "at least one"),
        ('{"moe_layer_count": 1, "layer_list": [3]}', "needs a layer_id of its own"),
        ('{"logical_count": [[1, 2, 3]]}', "not logical_count"),
        ('{"ep_size": 4, "physical_to_logical_map": [[0, 1, 2, 0]]}', "says ep_size 4"),
        ('{"physical_to_logical_map": [[0, 1, 2, 0]], "physical_to_logical_map": []}', "stands twice in one object"),
        ('{"num_slots": 4, "initial_global_assignments": {"3": [0, 1, 2]}}', "num_slots = 4 slots; layer 3 has 3"),
        ("moe_config:\n  num_slots: 4\n", "num_slots at the beginning of a line"),
        (YAML.replace("num_slots: 4 ", "num_slots: 5 "), "num_slots = 5 slots; layer 3 has 4"),
        (YAML.replace("num_slots: 4 ", "slots: 4 "), "num_slots must be a whole number from 1 to 65535, not None"),
        ('{"num_slots": 1180591620717411303424}', "num_slots must be a whole number from 1 to 65535"),
        (YAML.replace("  - 2", "  - 1"), "layer 11: expert 2 of the model's 3 has no slot"),
        (YAML.replace("  - 2", "  - x"), "line 6: expected a whole number, not x"),
        (YAML.replace("  - 2", "  - &a 2"), "line 6: expected 'key: value'"),
        (YAML.replace("2, 0]", "2, 0"), "a list or map is not closed"),
        (YAML.replace("'3': [", "'3': *a ["), "line 10: *a must be the anchor of a list above"),
        (YAML + "num_slots: 4\n", "line 13: num_slots stands twice"),
        (YAML + "ep_size: 4\n", "says ep_size 4: it is no map for `ep_size` 2"),
        (YAML.replace("2, 0]", "2, , 0]"), "expected a whole number"),
        (YAML.replace("'3'", "11"), "layer 11 is out of place, there twice"),
        (YAML.replace("'3': [", "'3': !!python/object ["), "expected a list of experts"),
        (MAP % f"[{[0, 1, 2, 0] * 9000}]", "its 36000 slots must be from the model's 3 experts to 32771"),
        ("num_slots: 4\ninitial_global_assignments:\n", "must be {layer: [expert of each slot]}, not {}"),
        ("num_slots: 4\ninitial_global_assignments: {3: [0, 1, 2, 0], 3: []}\n", "the key '3' stands twice"),
        ("num_slots: 4\ninitial_global_assignments: {3: &a [0, 1]}\n", "line 2: expected a map {layer: [experts]}"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(InputError) as error:
            read_placement(path, plain(3), 2)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_slots_of_a_map_are_ranks_in_order():
    slots = Placement.of_ranks("linear", 2, np.array([[1, 0, 1, 0]], np.int32))
    assert (slots.experts.tolist(), slots.expert_ranks.tolist()) == ([[1, 3, 0, 2]], [[1, 0, 1, 0]])
    assert not slots.has_replicas


def test_huge_and_binary_files(tmp_path, monkeypatch):
    path = tmp_path / "map"
    path.write_bytes(b"\x80\x04\x95")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_placement(path, plain(3), 2)
    monkeypatch.setattr("sim.files.MAX_BYTES", 10)
    path.write_text(MAP % "[[0, 1, 2, 0]]")
    with pytest.raises(InputError, match="is larger than"):
        read_placement(path, plain(3), 2)


def test_a_list_over_many_lines_is_read_in_one_pass(tmp_path):
    """200,000 lines took minutes where each was joined to all before it."""
    path = tmp_path / "map"
    path.write_text("num_slots: 3\ninitial_global_assignments:\n 0: [\n" + "1,\n" * 200_000 + "]\n")
    with pytest.raises(InputError, match="num_slots = 3 slots; layer 0 has 200000"):
        read_placement(path, plain(3), 1)
