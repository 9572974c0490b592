"""Text files from outside, read with bounds: a regular file of a bounded size, UTF-8, JSON or TOML without surprises."""

import json
import os
import tomllib
import zlib
from pathlib import Path
from typing import Any

from sim.errors import InputError

MAX_BYTES = 64 << 20


def read_json(path: Path, where: str) -> Any:
    """Parsed JSON; `where` begins the message of an error, such as 'model config FILE'."""
    return parse_json(read_text(path, where), where)


def parse_json(text: str, where: str) -> Any:
    """Parsed JSON of a text that was read; `where` begins the message of an error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {_first_line(error)}") from None


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """Parsed TOML; `where` begins the message of an error."""
    text = read_text(path, where)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not TOML: {_first_line(error)}") from None


def is_there(path: Path) -> bool:
    """Whether something lies at a path; a name that no file can have is not there."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for names that are too long)


def check_regular(path: Path, where: str) -> None:
    """Refuse pipes, devices and folders: opening or reading one may never end. What is missing is left to the reader."""
    if is_there(path) and not path.is_file():
        raise InputError(f"{where} cannot be read: it is not a regular file")


def read_text(path: Path, where: str) -> str:
    """Text of a regular file of a bounded size, unpacked where its name ends in .gz; `where` begins the message of an error."""
    check_regular(path, where)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if path.suffix == ".gz":
            data = zlib.decompressobj(wbits=31).decompress(data, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8-sig")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from None
    except zlib.error:
        raise InputError(f"{where} is not a sound .gz file") from None
    except UnicodeDecodeError:
        raise InputError(f"{where} is not text in UTF-8") from None
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{where} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
