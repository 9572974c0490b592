"""Files: those from outside are read with bounds (regular, of a bounded size, also unpacked), our own are written whole."""

import codecs
import gzip
import io
import json
import os
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sim.errors import InputError, shown

MAX_BYTES = 64 << 20
MOST_PACKED = 200
"""Numbers and text do not shrink to less than a 200th: what claims to is refused, unless it is small."""
MOST_UNASKED = 64 << 20  # bytes that a small .gz file may unpack to
MOST_STREAMED = 8 << 30  # bytes of a file that is read piece by piece


def read_json(path: Path, where: str) -> Any:
    """Parsed JSON; `where` begins the message of an error, such as 'model config FILE'."""
    return parse_json(read_text(path, where), where)


def parse_json(text: str, where: str) -> Any:
    """Parsed JSON of a text that was read; `where` begins the message of an error."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {first_line(error)}") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys must differ. Raises ValueError where one stands twice: one of its values would be lost."""
    held = dict(pairs)
    if len(held) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key '{shown(twice)}' stands twice in one object")
    return held


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """Parsed TOML; `where` begins the message of an error."""
    text = read_text(path, where)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not TOML: {first_line(error)}") from None


def is_there(path: Path) -> bool:
    """Whether something lies at a path; a name that no file can have is not there."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for names that are too long)


def is_folder(path: Path) -> bool:
    """Whether a folder lies at a path; a name that no folder can have is none."""
    return os.path.isdir(path)  # noqa: PTH112


def model_label(name: str) -> str:
    """What titles call a model: its name; of a config.json the folder that it is in, of another file the file's name."""
    path = Path(name)
    if path.name not in ("config.json", "params.json"):
        return path.name
    folder = path.parent.resolve() if path.is_file() else path.parent
    if folder.parent.name == "snapshots":  # Hugging Face's cache: models--ORG--NAME/snapshots/HASH
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name or path.name


def check_regular(path: Path, where: str) -> None:
    """Refuse pipes, devices and folders: opening or reading one may never end. What is missing is left to the reader."""
    if is_there(path) and not path.is_file():
        raise InputError(f"{where} cannot be read: it is not a regular file")


def read_text(path: Path, where: str) -> str:
    """Text of a regular file of a bounded size, unpacked where its name ends in .gz; `where` begins the message of an error."""
    with reading(where, "text"), open_stream(path, where) as file:
        data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8-sig")


@contextmanager
def reading(where: str, kind: str) -> Iterator[None]:
    """Errors of a file's reader, as one line that says what kind of file it is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{where} cannot be read: it does not exist") from None
    except EOFError:
        raise InputError(f"{where} is cut off") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise InputError(f"{where} does not fit into memory") from None
    except UnicodeDecodeError:
        raise InputError(f"{where} is not text in UTF-8 (packed? then its name must end in .gz)") from None
    except (
        Exception
    ) as error:  # a damaged header or stream raises almost anything: zlib.error, TokenError, TypeError ...
        raise InputError(f"{where} is not a sound {kind} file ({type(error).__name__})") from None


@contextmanager
def open_stream(path: Path, where: str) -> Iterator[IO[bytes]]:
    """The bytes of a regular file that is read piece by piece, unpacked where its name ends in .gz; text in UTF-16 as UTF-8.

    Reading raises InputError beyond MOST_STREAMED bytes, or where a .gz file unpacks to more than MOST_PACKED times its size.
    """
    check_regular(path, where)
    most = MOST_STREAMED
    with path.open("rb") as file:
        if path.suffix != ".gz":
            yield _in_utf8(io.BufferedReader(_Bounded(file, where, most)))
            return
        most = min(most, max(MOST_UNASKED, MOST_PACKED * path.stat().st_size))
        with gzip.open(file) as unpacked:
            yield _in_utf8(io.BufferedReader(_Bounded(unpacked, where, most), 2**18))


def _in_utf8(file: io.BufferedReader) -> io.BufferedReader:
    """The same bytes, but text in UTF-16, which begins with its byte order mark, in UTF-8."""
    is_utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return io.BufferedReader(_Recoded(file)) if is_utf16 else file


def numbered_lines(file: IO[bytes], where: str, most: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, from 1 on; one of `most` bytes or more is refused."""
    for number, line in enumerate(iter(lambda: file.readline(most), b""), 1):
        if len(line) >= most:
            raise InputError(f"{where}, line {number}: longer than {most >> 20} MiB")
        yield number, line


class _Bounded(io.RawIOBase):
    """A file that is read up to a bound."""

    def __init__(self, file: Any, where: str, most: int) -> None:
        self.file, self.where, self.left = file, where, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self.file.readinto(buffer)
        self.left -= n
        if self.left < 0:
            raise InputError(f"{self.where} is too large, or unpacks to more than {MOST_PACKED} times its size")
        return n


class _Recoded(io.RawIOBase):
    """A file in UTF-16 as UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.decoder, self.held = file, codecs.getincrementaldecoder("utf-16")(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"."
        while data and not self.held:
            data = self.file.read(2**16)
            self.held = self.decoder.decode(data, final=not data).encode()
        n = min(len(buffer), len(self.held))
        buffer[:n], self.held = self.held[:n], self.held[n:]
        return n


def first_line(error: Exception) -> str:
    """The message of an error, on one line of bounded length."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names beside `paths` that take their places when the block ends well, and vanish when it does not.

    Raises OSError with the name of the file that could not be written, InputError where a device or a pipe would be
    replaced.
    """
    for path in paths:
        if is_there(path) and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is not a regular file: it would be replaced")
    temporary = [path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in paths]
    try:
        yield temporary
        for path, target in zip(temporary, paths, strict=True):
            path.replace(target)
    except OSError as error:
        targets = dict(zip(map(str, temporary), paths, strict=True))
        name = targets.get(str(error.filename), error.filename or paths[0].parent)
        raise OSError(error.errno or 5, error.strerror or str(error).splitlines()[0], str(name)) from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """Make a folder before the work whose result it shall hold; if that fails, an empty folder is taken away again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise
