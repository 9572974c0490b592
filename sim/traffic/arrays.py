"""Arrays from outside: .npy, .npz, .safetensors and torch's .pt, bounded by their headers before they are read, no code run."""

import importlib
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np

from sim.errors import InputError
from sim.files import MOST_PACKED, reading

MAX_BYTES = 8 << 30
MAX_ARRAYS = 100_000
MOST_COUNTS = 2**27  # of an array that is no list of expert ids
_MOST_UNASKED = 1 << 30  # bytes that a small file may unpack to
_MAX_FILE_BYTES = 4 << 30  # of a file that a library reads whole
_PIECE = 2**20
_PARQUET_ROWS = 2**12  # at a time


class Archive:
    """The arrays of an .npz file, or the one of an .npy file (named ''), each read when it is asked for."""

    def __init__(self, path: Path, where: str, archive: zipfile.ZipFile | None) -> None:
        self.path, self.where, self.archive = path, where, archive
        members = [""] if archive is None else archive.namelist()
        self.names = [name.removesuffix(".npy") for name in members if archive is None or name.endswith(".npy")]
        if len(self.names) > MAX_ARRAYS:
            raise InputError(f"{where} has more than {MAX_ARRAYS} arrays")
        if archive is not None:
            _check_unpacked(path, where, archive)

    def read(self, name: str, kinds: str = "iu", most: int | None = MOST_COUNTS) -> np.ndarray:
        """One array of whole numbers (or of the dtype kinds given), of `most` numbers, after a look at its header."""
        self._check(name, kinds, most)
        with self._open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def read_ids(self, name: str) -> np.ndarray:
        """One array of expert ids, int16, converted piece by piece: no more memory than the ids need."""
        shape, dtype, in_rows = self._check(name, "iu", None)
        if dtype == np.int16 or not in_rows:
            return narrow_ids(self.read(name, most=None), self.where)
        ids = np.empty(shape, np.int16)
        flat, done = ids.reshape(-1), 0
        with self._open(name) as member:
            _header(member)
            while done < flat.size:
                data = member.read(min(_PIECE, flat.size - done) * dtype.itemsize)
                piece = np.frombuffer(data, dtype)
                if piece.size == 0:
                    raise InputError(f"{self.where}: {name or 'its array'} is cut off")
                flat[done : done + piece.size] = narrow_ids(piece, self.where)
                done += piece.size
        return ids

    def head(self, name: str, rows: int) -> np.ndarray:
        """The first rows of an array of numbers."""
        shape, dtype, in_rows = self._check(name, "iuf", None)
        if math.prod(shape[1:]) > _PIECE:
            raise InputError(f"{self.where}: {name or 'its array'} has rows of {math.prod(shape[1:])} numbers")
        if not in_rows or shape[0] <= rows:
            return self.read(name, "iuf", None)[:rows]
        shape = (rows, *shape[1:])
        with self._open(name) as member:
            _header(member)
            return np.frombuffer(member.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

    def shape(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of an array by its header."""
        with self._open(name) as member:
            return _header(member)[:2]

    def _check(self, name: str, kinds: str, most: int | None) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
        """Header of an array that may be read."""
        what = name or "its array"
        if name not in self.names:
            raise InputError(f"{self.where} has no array '{name}'; it needs topk_ids and sequence_lengths")
        with self._open(name) as member:
            shape, dtype, in_rows = _header(member)
            begin = member.tell()
        if dtype.kind not in kinds:
            words = "whole numbers" if kinds == "iu" else "numbers"
            raise InputError(f"{self.where}: {what} must be of {words}, not {dtype}")
        wanted_bytes = math.prod(shape) * dtype.itemsize
        if wanted_bytes > MAX_BYTES:
            raise InputError(f"{self.where}: {what} is larger than {MAX_BYTES >> 30} GiB")
        if most is not None and math.prod(shape) > most:
            raise InputError(f"{self.where}: {what} has {math.prod(shape)} numbers, more than {most}")
        if begin + wanted_bytes > self._held_bytes(name):
            raise InputError(f"{self.where}: {what} is cut off")
        return shape, dtype, in_rows

    def _open(self, name: str) -> IO[bytes]:
        return self.path.open("rb") if self.archive is None else self.archive.open(f"{name}.npy")

    def _held_bytes(self, name: str) -> int:
        return self.path.stat().st_size if self.archive is None else self.archive.getinfo(f"{name}.npy").file_size


def narrow_ids(ids: np.ndarray, where: str) -> np.ndarray:
    """Expert ids as int16; 65535, which is -1 in uint16, is padding."""
    if ids.size and ids.max() > 2**15 - 1:
        ids = np.where(ids == 2**16 - 1, -1, ids.astype(np.int64) if ids.dtype.kind == "u" else ids)
    if ids.size and (ids.min() < -1 or ids.max() > 2**15 - 1):
        raise InputError(
            f"{where}: expert ids must lie from 0 to 32767 (-1: padding), found {ids.min()} to {ids.max()}"
        )
    return ids.astype(np.int16, copy=False)


def _check_unpacked(path: Path, where: str, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that says it unpacks to many times its size."""
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_MOST_UNASKED, MOST_PACKED * path.stat().st_size):
        raise InputError(f"{where} would unpack to {unpacked >> 20} MiB, over {MOST_PACKED} times its size")


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype, and whether the array lies row by row."""
    version = np.lib.format.read_magic(member)
    read: Callable[..., Any] = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(member)
    return tuple(int(n) for n in shape), dtype, not by_columns


@contextmanager
def open_archive(path: Path, where: str) -> Iterator[Archive]:
    """The arrays of an .npz or .npy file. Raises InputError where it is missing, damaged or none."""
    with reading(where, path.suffix if path.suffix in (".npy", ".npz") else ".npz"):
        if path.suffix == ".npy":
            yield Archive(path, where, None)
        else:
            with zipfile.ZipFile(path) as archive:
                yield Archive(path, where, archive)


def array_of_bytes(data: bytes, here: str) -> np.ndarray:
    """The array of whole numbers of a whole .npy file in memory (vLLM's HTTP answers have one in base64)."""
    file = io.BytesIO(data)
    with reading(here, ".npy"):
        shape, dtype, _ = _header(file)
        if dtype.kind not in "iu":
            raise InputError(f"{here}: its array must be of whole numbers, not {dtype}")
        if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
            raise InputError(f"{here}: its array is cut off")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def read_pt(path: Path, where: str, instead: str = "save the arrays as .npz") -> Any:
    """What a torch file holds: tensors in dicts and lists, unpickled with no code allowed. Needs the extra epsim[torch], or else
    what `instead` says.
    """
    torch = _library("torch", path, where, instead)
    with reading(where, ".pt"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_unpacked(path, where, archive)
    try:
        with reading(where, ".pt"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:
        if "UnpicklingError" in str(error):
            raise InputError(f"{where} is damaged, or holds more than tensors: it is not unpickled") from None
        raise


def _library(name: str, path: Path, where: str, instead: str = "save the arrays as .npz") -> Any:
    """What reads a file whole, where it is installed and the file is not too large for that."""
    with reading(where, path.suffix):
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{where} is larger than {_MAX_FILE_BYTES >> 30} GiB")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"{where}: reading {path.suffix} files needs {name}, which is not installed: pip install "
            f"'epsim[{name}]' (or {instead})"
        ) from None


def as_array(value: Any, where: str) -> np.ndarray | None:
    """A tensor of torch as an array; None for what is no tensor."""
    if isinstance(value, np.ndarray):
        return value
    if not callable(getattr(value, "numpy", None)):
        return None
    with reading(where, ".pt"):
        try:
            return np.asarray(value.numpy())
        except (TypeError, RuntimeError):  # bfloat16, which numpy lacks; or part of a graph
            return np.asarray(value.detach().float().numpy())


def read_safetensors(path: Path, where: str, is_read: Callable[[list[str]], bool]) -> dict[str, Any]:
    """The arrays of a .safetensors file by name; where its names are not those of what is read, None instead of each: a model's
    weights are not read. Needs the extra epsim[safetensors].
    """
    library = _library("safetensors", path, where)
    with reading(where, ".safetensors"):
        try:
            with library.safe_open(path, "numpy") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names} if is_read(names) else dict.fromkeys(names)
        except (TypeError, KeyError) as error:  # bfloat16, float8
            raise InputError(f"{where} has arrays of a type that numpy lacks ({error}); save int64") from None


@contextmanager
def parquet_as_text(path: Path, where: str) -> Iterator[Path]:
    """A Parquet file as one of JSON lines, where a column holds lists, else of CSV, for the block."""
    library = _library("pyarrow.parquet", path, where)
    with TemporaryDirectory() as folder, reading(where, ".parquet"):
        held, n_bytes = library.ParquetFile(path), 0
        has_lists = any(
            str(kind).startswith(("list", "large_list", "fixed_size_list")) for kind in held.schema_arrow.types
        )
        text = Path(folder, "rows.jsonl" if has_lists else "rows.csv")
        with text.open("w", encoding="utf-8") as file:
            for n, batch in enumerate(held.iter_batches(_PARQUET_ROWS)):
                n_bytes += batch.nbytes
                if n_bytes > _MAX_FILE_BYTES:
                    raise InputError(f"{where} unpacks to more than {_MAX_FILE_BYTES >> 30} GiB")
                frame = batch.to_pandas(ignore_metadata=True)
                index = [name for name in frame if name.startswith("__index_level_")]  # of a data frame
                frame = frame[[*index, *frame.columns.drop(index)]].rename(columns=dict.fromkeys(index, ""))
                if has_lists:
                    frame.to_json(file, orient="records", lines=True)
                else:
                    frame.to_csv(file, index=False, header=n == 0)
        yield text
