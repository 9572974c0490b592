"""Settings that every numba kernel of the package shares, and the processors that they may run on."""

import hashlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numba
from numba.extending import register_jitable


def source_digest() -> str:
    """Digest of the package's Python sources, in a fixed order."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    """Folder for this state of the sources, under the user's cache, or a temporary one where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(home) / "epsim" / source_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    temporary = tempfile.mkdtemp(prefix="epsim-")
    os.environ["NUMBA_CACHE_DIR"] = temporary  # else processes that this one starts compile in folders of their own
    return Path(temporary)


# numba checks a cached kernel against its own file only, so an edited callee in another file would be missed.
# A folder per state of the sources makes a stale kernel impossible.
if "NUMBA_CACHE_DIR" not in os.environ:
    vars(numba.config)["CACHE_DIR"] = str(_cache_folder())


def is_cold() -> bool:
    """Whether no kernel was compiled yet in the cache folder, so that the first run takes longer."""
    return not any(Path(vars(numba.config)["CACHE_DIR"]).rglob("*.nbi"))


kernel: Any = partial(numba.njit, cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
"""Decorator of a compiled kernel: arrays in, preallocated output last, no validation."""

part: Any = register_jitable(error_model="numpy", no_cfunc_wrapper=True)
"""Decorator of a part of one kernel: it compiles faster than a kernel, since Python has no way in (to Python it is a plain
function). What several kernels call is better a kernel: the cache keeps it, and a part compiles once for kernels, once for parts.
"""

small_part: Any = register_jitable(error_model="numpy", no_cfunc_wrapper=True, forceinline=True)
"""Decorator of a part so small that it is always put in the place of its call."""


def usable_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
