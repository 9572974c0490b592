"""Readers of recorded routing and of load counts: what is read, and what is refused."""

import base64
import json
import os
import sys
import zipfile

import numpy as np
import pytest
from conftest import fails, write

from sim import InputError, load_model, load_workload
from sim.traffic import LoadCounts, read_traffic

RNG = np.random.default_rng(0)
# Three requests of 5, 7 and 4 tokens, 4 layers of which the first is dense, 32 experts, top-4.
REQUESTS = [
    np.concatenate([np.zeros((n, 1, 4), int), RNG.random((n, 3, 32)).argsort(axis=2)[:, :, :4]], axis=1)
    for n in (5, 7, 4)
]
COUNTS = RNG.multinomial(4000, np.full(16, 1 / 16), size=(3, 4))  # steps, layers, experts


def encoded(ids, dtype="<i4"):
    return base64.b64encode(ids.astype(dtype).tobytes()).decode()


def test_arrays_of_counts(tmp_path):
    """And a table of bare rows; other tables: test_load_tables."""
    for path in (
        write(tmp_path / "a.npy", counts=COUNTS),
        write(tmp_path / "b.npz", logical_count=COUNTS.astype(np.int32)),
    ):
        data = read_traffic(path)
        assert isinstance(data, LoadCounts)
        np.testing.assert_array_equal(data.counts, COUNTS)
    plain = tmp_path / "plain.csv"
    plain.write_text("\n".join(",".join(map(str, row)) for row in COUNTS[0]))
    np.testing.assert_array_equal(read_traffic(plain).counts, COUNTS[:1])
    floats = read_traffic(write(tmp_path / "f.npy", x=COUNTS[0] / 7))
    np.testing.assert_allclose(floats.total, COUNTS[0] / 7)


def test_published_loads_are_read(shared):
    data = read_traffic(shared / "traces" / "olmoe-c4-load.csv", load_model("olmoe-1b-7b"))
    assert data.layer_ids.tolist() == [0, 7, 15]
    assert data.total.sum(axis=1).tolist() == [1671168] * 3


def test_what_needs_torch_or_is_torn_or_not_there_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "x.pt"
    path.write_bytes(b"PK")
    fails(capsys, ["traffic", "show", path], "pip install 'epsim[torch]' (or save the arrays as .npz)")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    fails(capsys, ["traffic", "show", tmp_path / "x.parquet"], "is not a sound .parquet file")
    fails(capsys, ["traffic", "show", tmp_path / "nothing"], "does not exist")


def test_torch_itself(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is an optional extra")
    torch.save({"logical_count": torch.tensor(COUNTS, dtype=torch.int32)}, tmp_path / "x.pt")
    np.testing.assert_array_equal(read_traffic(tmp_path / "x.pt").counts, COUNTS)
    torch.save({"logical_count": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="not unpickled"):
        read_traffic(tmp_path / "bad.pt")


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return exec, ("raise SystemExit(99)",)


def bad_arrays():
    nan, negative = COUNTS / 1.0, COUNTS.copy()
    nan[1, 2, 3], negative[1, 2, 3] = np.nan, -5
    yield "nan", nan, "found NaN"
    yield "negative", negative, "must not be negative, found -5 (step 1, layer 2, expert 3)"
    yield "infinite", np.where(np.isnan(nan), np.inf, nan), "found infinity"
    yield "zeros", np.zeros((3, 4, 16)), "every count is 0"
    yield "object", np.array([{"a": 1}, Trap()], dtype=object), "whole numbers"
    yield "text", np.array([["a", "b"]]), "must be of numbers, not <U1"
    yield "complex", COUNTS * 1j, "must be of numbers, not complex128"
    yield "one axis", np.arange(5), "shape"
    yield "four axes", np.zeros((2, 2, 2, 2), int), "shape"
    yield "empty", np.zeros((0, 4, 4)), "must be numbers"
    yield "huge ids", REQUESTS[0] * 1.0 + np.nan, "found NaN"
    yield "padding only", np.full((3, 4, 4), -1), "no tokens"


@pytest.mark.parametrize(
    ("name", "array", "message"), list(bad_arrays()), ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_bad_arrays_are_refused_in_one_line(tmp_path, capsys, name, array, message, suffix):
    path = tmp_path / f"x{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, array, allow_pickle=True)
    before = set(tmp_path.iterdir())
    fails(capsys, ["traffic", "show", path], message, path)
    fails(capsys, ["traffic", "fit", path, "--model", "olmoe-1b-7b", "--out", tmp_path / "my.toml"], message)
    assert set(tmp_path.iterdir()) == before


def test_bad_text_is_refused_in_one_line(tmp_path, capsys):
    for name, text, message in (
        ("x.csv", "1,2\nx,3\n", "line 2: 'x' is not a number"),
        ("x.csv", "1,inf\n", "found infinity"),
        ("x.csv", "layer,e0,e1\n0,1,2\n0,3,4\n", "2 rows are not one for each of 1 layers"),
        ("x.csv", "step,layer,e0,e1\n0,0,1,2\n1,1,3,4\n", "2 rows are not one for each of 2 layers in 2 steps"),
        ("x.csv", "layer,e0,e1\nnan,1,2\n", "layers must be whole numbers"),
        ("x.csv", "layer,e0,e1\n-1,1,2\n", "layers must be whole numbers"),
        ("x.csv", "1O,2\n3,4\n", "is not known: neither counts nor a name for each column"),
        ("x.csv", "layer,a,b\n0,3,4\n", "is not known: neither counts nor a name for each column"),
        ("x.csv", "step,e0,e1\n0,3,4\n", "line 1: a column 'step' needs a column 'layer'"),
        ("x.csv", "", "no rows"),
        ("x.csv", "e0,e1\n", "no rows"),
        ("x.csv", "0,0\n0,0\n", "every count is 0"),
        ("x.csv", "1,2," * 400_000, "longer than 1 MiB"),
        ("x.csv", "\ud800".encode("utf-8", "surrogatepass"), "not text in UTF-8"),
        ("x.jsonl", "{", "line 1 is not JSON"),
        ("x.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("x.json", '[\n[[1, 2]]\n', "is not JSON, nor is the file as a whole"),
        ("x.jsonl", '{"routed_experts": "AAAAAA==", "shape": [1' + 400 * "0" + ", 1, 1]}", "do not fill the shape [1000"),
        ("x.jsonl", "", "no tokens"),
        ("x.jsonl", "3", "whole numbers [tokens][layers][top_k]"),
        ("x.jsonl", '{"routed_experts": [[[1, 2], [3]]]}', "not a regular list"),
        ("x.jsonl", '{"routed_experts": [[[1.5, 2]]]}', "whole numbers [tokens][layers][top_k]"),
        ("x.jsonl", '{"routed_experts": [[[1, 40000]]]}', "from 0 to 32767"),
        ("x.jsonl", '{"routed_experts": [[[1, 1]]]}', "same expert id twice"),
        ("x.jsonl", '[[[1, 2]]]\n[[[1, 2], [3, 4]]]', "request 1 has layers x top_k 2x2, the first one 1x2"),
        ("x.jsonl", '{"routed_experts": "AAA"}', "not base64"),
        ("x.jsonl", '{"routed_experts": "AAAA"}', "cut off"),
        ("x.jsonl", '{"routed_experts": "AAAAAA=="}', "need --model"),
        ("x.jsonl", '{"routed_experts": "AAAAAA==", "shape": 3}', "shape must be a list"),
        ("x.npz", "PK", "not a sound .npz"),
        ("x.npy", "\x93NUMPY", "not a sound .npy"),
        ("x.bin", "1,2", "the ending must be one of"),
        ("x.txt", "INFO 08-11 starting up\n", "neither counts nor a name for each column"),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
        fails(capsys, ["traffic", "show", path], message)


def test_torn_and_boasting_files_are_refused_before_they_are_read(tmp_path, capsys):
    path = tmp_path / "x.npy"
    np.save(path, COUNTS)
    path.write_bytes(path.read_bytes()[:-8])
    fails(capsys, ["traffic", "show", path], "cut off")
    header = {"descr": "<i8", "fortran_order": False, "shape": (2**20, 2**20)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    fails(capsys, ["traffic", "show", path], "larger than 8 GiB")
    header["shape"] = (2**10, 2**10)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("counts.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
    fails(capsys, ["traffic", "show", tmp_path / "x.npz"], "cut off")
    fails(capsys, ["traffic", "show", tmp_path / "absent.npz"], "does not exist")
    (tmp_path / "folder.csv").mkdir()
    fails(capsys, ["traffic", "show", tmp_path / "folder.csv"], "has no file that is known")


def test_counts_are_no_workload_before_they_are_fitted(tmp_path, capsys, small):
    path = write(tmp_path / "x.npy", x=LOADS)
    fails(capsys, ["sweep", "--model", small, "--workload", f"file:{path}"], "fit them first (epsim traffic fit")


@pytest.mark.slow
def test_a_compressed_file_is_not_unpacked_beyond_its_declared_size(tmp_path, capsys):
    """A member that says it is larger than the bound is refused by its header, whatever it is packed to."""
    path = tmp_path / "x.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "<i8", "fortran_order": False, "shape": (2**31, 1, 2)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(2**20))
    fails(capsys, ["traffic", "show", path], "GiB")
    for shape, message in (((2**20, 4, 40), "more than 134217728"), ((1, 2, 2**24), "rows of")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<i4", "fortran_order": False, "shape": shape})
            for _ in range(np.prod(shape) // 2**20):
                member.write(np.full(2**20, 7, "<i4").tobytes())
        fails(capsys, ["traffic", "show", path], message)


def test_small_files_that_unpack_to_gigabytes_are_refused(tmp_path, capsys, monkeypatch):
    """Many members, each within the bound of one array; here of megabytes."""
    monkeypatch.setattr("sim.traffic.arrays._MOST_UNASKED", 1 << 20)
    zeros = np.zeros((2**16, 1, 4), np.int16)
    path = write(tmp_path / "x.npz", **{f"r{i}": zeros for i in range(5)})
    fails(capsys, ["traffic", "show", path], "would unpack to 2 MiB", path)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv", ".jsonl", ".pt"])
def test_pipes_are_not_waited_for(tmp_path, capsys, suffix):
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path)
    fails(capsys, ["traffic", "show", path], "not a regular file", path)
    fails(capsys, ["step", "--log", path], "not a regular file", path)


def test_wide_and_column_ordered_ids_are_read_alike(tmp_path):
    ids = REQUESTS[1][:, 1:]
    forms = [ids.astype(np.int16), ids.astype(np.int64), ids.astype(">i4"), np.asfortranarray(ids.astype(np.uint8))]
    digests = {read_traffic(write(tmp_path / "x.npy", x=form)).digest for form in forms}
    assert len(digests) == 1


SMALL = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
LOADS = np.array(
    [[900, 40, 60, 30, 20, 10, 500, 40], [40, 60, 30, 20, 10, 500, 40, 900], [60, 30, 20, 10, 500, 40, 900, 40]]
)
IDS = RNG.random((20, 3, 8)).argsort(axis=2)[:, :, :2]
REVERSED = np.tile(np.arange(8)[::-1], (3, 1))


@pytest.fixture
def small(tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def csv_of(table, head=""):
    return head + "\n".join(",".join(map(str, row)) for row in table) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("x.csv", csv_of(LOADS, "1,2,3,4,5,6,7,8\n"), "numbered from 1"),
        ("x.csv", csv_of(np.column_stack([range(3), LOADS])), "its first column, 0 to 2, is taken for the layer"),
        ("x.npz", {"counts": LOADS[:, ::-1], "physical_to_logical_map": REVERSED}, "named counts"),
        ("x.json", {"counts": LOADS[:, ::-1].tolist(), "phy2log": REVERSED.tolist()}, "'counts'"),
        ("x.json", {"layers": [{"layer_id": i, "counts": row} for i, row in enumerate(LOADS.tolist())]}, "per layer"),
        ("x.npz", {"counts": LOADS, "load": LOADS * 2}, "not read: load"),
        ("x.npz", {f"layer_{i}": row for i, row in enumerate(LOADS)}, "for each layer"),
        ("x.json", {"physical_count": LOADS[:, ::-1].tolist(), "physical_to_logical_map": REVERSED.tolist()}, "physical_count"),
        ("x.json", {f"layer_{i}": {"expert_counts": row, "total": 1600} for i, row in enumerate(LOADS.tolist())}, "{layer:"),
        ("x.json", {"tokens_per_expert": LOADS.tolist()}, "tokens_per_expert"),
        ("x.csv", csv_of(np.column_stack([range(3), LOADS, LOADS.sum(axis=1)]), "layer,0,1,2,3,4,5,6,7,total\n"), "total"),
        ("x.csv", "".join(",".join(map(str, row)) + ",\n" for row in LOADS), "without names"),
        ("x.csv", "layer,expert,count\n" + "".join(f"model.layers.{i}.mlp,expert_{e},{LOADS[i, e]}\n" for i in range(3)
         for e in range(8)), "per layer and expert"),
        ("x.csv", csv_of([[f"{n / 16}%" for n in row] for row in LOADS]), "its loads are percentages"),
        ("x.csv", csv_of([[f'"{n * 10**6:,}"' for n in row] for row in LOADS]), "commas in its numbers are taken for thousands"),
        ("x.tsv", csv_of(np.column_stack([range(8), LOADS.T]), "expert,L0,L1,L2\n").replace(",", "\t"), "row per expert"),
        ("x.csv", csv_of(LOADS.T, "model.layers.0,model.layers.1,model.layers.2\n"), "a row per expert, a column per layer"),
        ("x.csv", "rank,layer,expert,count\n" + "".join(f"{e // 4},{i},{e},{LOADS[i, e]}\n" for i in range(3)
         for e in range(8)), "2 ranks are added up"),
    ],
)  # fmt: skip
def test_loads_in_odd_forms_are_read_right_and_said(tmp_path, small, name, content, note):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif name.endswith(".npz"):
        np.savez(path, **content)
    else:
        path.write_text(json.dumps(content))
    found = read_traffic(path, small)
    np.testing.assert_array_equal(found.expert_counts * LOADS.sum(), LOADS * found.expert_counts.sum())
    assert "%" in str(content) or "," in str(content)[:9] or found.expert_counts.sum() == LOADS.sum()
    assert any(note in text for text in found.notes), found.notes


@pytest.mark.parametrize(
    ("array", "note"),
    [
        (LOADS / LOADS.sum(axis=1, keepdims=True), "its loads are fractions"),
        (np.stack([LOADS, 2 * LOADS]), "no count falls from one step to the next"),
        (LOADS.astype(np.uint8), "would have wrapped around"),
        (LOADS * [[1], [2], [1]], "its layers' loads add up to 1600 to 3200"),
        ((LOADS * 1e9).astype(np.float32), "where a counter stands still"),
        (np.column_stack([LOADS[:, :7], LOADS[:, :7].sum(axis=1)]), "a shared expert?"),
        (np.pad(LOADS[:, :4], ((0, 0), (0, 4))), "no layer uses experts 4 to 7"),
    ],
)
def test_loads_that_may_mean_something_else_are_noted(tmp_path, small, array, note):
    np.save(tmp_path / "x.npy", array)
    found = read_traffic(tmp_path / "x.npy", small)
    assert any(note in text for text in found.notes), found.notes
    shares = found.expert_counts / found.expert_counts.sum(axis=1, keepdims=True)
    total = array.sum(axis=0) if array.ndim == 3 else array
    np.testing.assert_allclose(shares, total / total.sum(axis=1, keepdims=True), atol=1e-5)


def test_exchanged_axes_and_physical_experts_are_refused(tmp_path, capsys, small):
    for name, content, message in (
        ("x.npy", LOADS.T, "are the axes exchanged"),
        ("x.npy", IDS.transpose(1, 0, 2), "are the axes exchanged"),
        ("x.npy", REVERSED, "a map of experts, and no loads"),
        ("x.npy", np.column_stack([REVERSED, [[3, 5]] * 3]), "a map of experts, and no loads"),
        ("x.npy", [[0, 1, 1, 0, 3, 2, 3, 2], [3, 2, 2, 0, 0, 1, 3, 1]], "ranks of experts, and no loads"),
        ("x.npz", {f"layers.{i}.router.expert_bias": row for i, row in enumerate(LOADS)}, "holds no loads by its name"),
        ("x.npz", {"logical_replica_count": LOADS}, "'logical_replica_count' holds no loads by its name"),
        ("x.npz", {"log2phy": LOADS[..., None]}, "'log2phy' holds no loads by its name, nor ids"),
        ("x.npz", {"expert_load_view": LOADS}, "counts physical experts, and no map"),
        ("x.npy", np.full((4, 3, 8), 1 / 8), "adds up to 1: probabilities"),
        ("x.npy", np.tile(LOADS, (100, 1)), "300 layers"),
        ("x.npy", np.tile(IDS.transpose(1, 0, 2), (1, 20, 1)), "are the axes exchanged"),
        ("x.npy", IDS.astype(np.float32), "must be of whole numbers, not float32"),
        ("x.npy", np.where(IDS > 5, -1, IDS), "tokens lack an expert in some layer (-1): zero-compute experts"),
        ("x.csv", "layer,e0,e1\n0,50%,3\n", "some of its numbers have a percent sign"),
        ("x.csv", "layer;e0;e1\n0;1,234;5,678\n", "commas in its numbers, of thousands or decimals?"),
        ("x.csv", "expert,layer_0,count\n0,1,2\n", "a column for each layer goes with a row for each expert"),
        ("x.csv", "5,6,\n7,8,9\n", "other lines have a value behind it"),
        ("x.csv", "layer,expert,count\nlayer_0,0,5\nfoo,1,7\n", "line 3: 'foo' is not a number"),
        ("x.npz", {"physical_count": LOADS}, "counts physical experts, and no map"),
        ("x.npz", {"counts": LOADS, "phy2log": REVERSED[:2]}, "it must be [layers, slots]"),
        ("x.csv", "layer,token,expert,count\n0,0,1,2\n", "'token' is not known"),
        ("x.json", '{"0": [1, 2], "0": [3, 4]}', "the key '0' stands twice"),
    ):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            np.save(path, content)
        fails(capsys, ["traffic", "show", path, "--model", small], message)
        fails(
            capsys, ["sweep", "--model", small, "--workload", f"file:{path}", "--ep", "2", "--tokens", "4"], str(path)
        )


def test_an_array_that_only_a_model_can_tell_says_what_its_axes_were_taken_for(tmp_path, small):
    for array, note in (
        (
            IDS.transpose(1, 0, 2),
            "shape [3, 20, 2] is taken for [tokens, layers, top_k]: of [layers, tokens, top_k] exchange",
        ),
        (LOADS[:, None], "shape [3, 1, 8] is taken for [steps, layers, experts]: of [layers, steps, experts] exchange"),
        (LOADS, "shape [3, 8] is taken for [layers, experts]: loads of ranks, and ids"),
    ):
        np.save(tmp_path / "x.npy", array)
        assert note in read_traffic(tmp_path / "x.npy").notes[0]
        if array.ndim == 3:
            with pytest.raises(InputError, match="are the axes exchanged"):
                read_traffic(tmp_path / "x.npy", small)
        else:
            assert "without --model" not in read_traffic(tmp_path / "x.npy", small).notes[0]


@pytest.mark.parametrize("filler", [-1, 0, 8, 65535])
def test_padding_tokens_are_left_out_whatever_fills_them(tmp_path, small, filler):
    padded = np.concatenate([IDS, np.full((3, 3, 2), filler)])
    for name in ("x.npy", "x.npz"):
        path = write(tmp_path / name, routed_experts=padded.astype(np.uint16 if filler > 0 else np.int32))
        found = read_traffic(path, small)
        assert found.starts.tolist() == [0, 20]  # one array is one request
        assert any(note.startswith("3 ") for note in found.notes)


def test_base64_of_any_width_is_read_in_every_verb(tmp_path, small):
    wanted = read_traffic(write(tmp_path / "x.npz", request=IDS), small).digest
    for dtype in ("<i4", "<u2", "u1", ">u2"):
        line = {"routed_experts": encoded(IDS, dtype)} | ({"routed_experts_dtype": dtype} if dtype[0] == ">" else {})
        assert load_workload(write(tmp_path / "x.jsonl", lines=[line]), small).digest == wanted
        line |= {"routed_experts_shape": [20, 3, 2]}
        assert load_workload(write(tmp_path / "x.jsonl", lines=[line])).digest == wanted


@pytest.mark.parametrize("name", ["layer_{}.npy", "L{}.npy", "layer{}.jsonl"])
def test_a_file_for_each_layer_is_not_taken_for_requests(tmp_path, capsys, name):
    for layer in range(3):
        ids = IDS[:, layer : layer + 1]
        write(tmp_path / name.format(layer), **({"lines": [ids.tolist()]} if name.endswith("l") else {"ids": ids}))
    fails(capsys, ["traffic", "show", tmp_path], "has a file for each layer")


def test_ids_in_odd_forms_are_the_same_tokens(tmp_path, small):
    wanted = read_traffic(write(tmp_path / "x.npz", request=IDS), small).digest
    padded = np.concatenate([IDS, np.full((20, 3, 6), -1)], axis=2)
    batch = np.pad(IDS[None], ((0, 0), (0, 5), (0, 0), (0, 0)))
    for arrays in (
        {"topk_ids": IDS, "topk_weights": IDS / 7},
        {"selected_experts": IDS, "layer": np.arange(3)},
        {"expert_ids": IDS, "cu_seqlens": np.array([0, 20])},
        {"ids": padded},
        {"topk_ids_of_layer": IDS.transpose(1, 0, 2)},  # SGLang's have layers first
        {"routed_experts": batch},
        {f"layer_{i}": IDS[:, i] for i in range(3)},
    ):
        assert read_traffic(write(tmp_path / "x.npz", **arrays), small).digest == wanted
    for key in ("topk_ids", "rollout_routed_experts"):
        lines = [{key: IDS.tolist()}, {key: ""}]
        assert read_traffic(write(tmp_path / "x.jsonl", lines=lines), small).digest == wanted


def test_shared_experts_that_an_engine_fused_in_are_left_out_with_a_note(tmp_path, small):
    """SGLang numbers them behind the routed experts, as one more of each token's."""
    fused = np.concatenate([IDS, np.full((20, 3, 1), 8)], axis=2)
    wanted = read_traffic(write(tmp_path / "x.npz", request=IDS), small)
    for array in (fused, np.column_stack([wanted.expert_counts, [20] * 3])):
        found = read_traffic(write(tmp_path / "x.npy", x=array), small)
        np.testing.assert_array_equal(found.expert_counts, wanted.expert_counts)
        assert any("fused in" in note for note in found.notes)


def test_lines_of_json_are_steps_of_counts_and_never_tokens_taken_for_them(tmp_path, capsys, small):
    for step in ({"step": 0, "counts": LOADS.tolist()}, {"layers": dict(enumerate(LOADS.tolist()))}, LOADS.tolist()):
        found = read_traffic(write(tmp_path / "x.jsonl", lines=[step, step]), small)
        np.testing.assert_array_equal(found.counts, [LOADS, LOADS])
    rows = [
        {"step": s, "layer": i, "tokens_per_expert": LOADS[i].tolist(), "time": 0.5} for s in (0, 1) for i in range(3)
    ]
    np.testing.assert_array_equal(read_traffic(write(tmp_path / "x.jsonl", lines=rows), small).counts, [LOADS, LOADS])
    for lines in (IDS.tolist(), [{"step": t, "layer": 0, "experts": row[0]} for t, row in enumerate(IDS.tolist())]):
        fails(capsys, ["traffic", "show", write(tmp_path / "x.jsonl", lines=lines)], "error: workload file")
