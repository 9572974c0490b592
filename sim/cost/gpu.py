"""GPUs by preset name or from a TOML file of the presets' keys."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sim.cost.tables import read_table
from sim.errors import InputError, shown, unknown
from sim.files import read_toml

DTYPES = ("bf16", "fp8", "fp4")
_NEEDED = ("hbm_tb_per_s", "bf16_tflops", "scale_up_gb_per_s")
_OPTIONAL = ("fp8_tflops", "fp4_tflops", "scale_out_gb_per_s", "bandwidth_fraction", "peak_fraction", "copy_fraction")


@dataclass(frozen=True)
class Gpu:
    """What one GPU can do at most.

    Attributes
    ----------
    name : str
    hbm_tb_per_s : float
        Memory bandwidth, TB/s.
    bf16_tflops, fp8_tflops, fp4_tflops : float
        Dense tensor-core peaks, TFLOPS; None where the chip does not compute in the type.
    scale_up_gb_per_s, scale_out_gb_per_s : float
        NVLink and network bandwidth of one GPU per direction, GB/s; scale-out None where it differs by cluster.
    bandwidth_fraction, peak_fraction : float
        Shares of memory bandwidth and peak that a grouped GEMM was measured to reach on this chip; None: the kernel
        profile's.
    copy_fraction : float
        Share of the memory bandwidth that a copy inside the chip was measured to reach; None: the exchange profile's.
    unverified : tuple of str
        Fields whose numbers are from secondary sources.
    source : str
        Where the numbers were read.
    """

    name: str
    hbm_tb_per_s: float
    bf16_tflops: float
    scale_up_gb_per_s: float
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    scale_out_gb_per_s: float | None = None
    bandwidth_fraction: float | None = None
    peak_fraction: float | None = None
    copy_fraction: float | None = None
    unverified: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"gpu name must be a string that is not empty, not {shown(self.name)}")
        where = f"gpu {shown(self.name)}: "
        for field in (*_NEEDED, *_OPTIONAL):
            value = getattr(self, field)
            if value is None and field in _OPTIONAL:
                continue
            most = 1.0 if field.endswith("_fraction") else 1e6
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise InputError(f"{where}{field} must be a number above 0 and at most {most:g}, not {shown(value)}")
        if not isinstance(self.source, str):
            raise InputError(f"{where}source must be a string, not {shown(self.source)}")
        for field in self.unverified:
            if field not in (*_NEEDED, *_OPTIONAL):
                raise InputError(f"{where}unverified must name fields with numbers, not {shown(field)}")

    def peak_tflops(self, dtype: str) -> float:
        """Dense peak in one of the DTYPES; InputError where the chip has none."""
        peaks = {known: getattr(self, f"{known}_tflops") for known in DTYPES}
        if dtype not in DTYPES:
            raise InputError(f"`dtype` {shown(dtype)}: must be one of {', '.join(DTYPES)}")
        if peaks[dtype] is None:
            has = ", ".join(known for known in DTYPES if peaks[known])
            raise InputError(f"`dtype` {dtype}: gpu {self.name} has no {dtype} peak; it has {has}")
        return float(peaks[dtype])


def gpu_names() -> list[str]:
    """Names of the presets, in the order of the table."""
    return list(read_table("gpus.toml"))


def load_gpu(name_or_path: str | Path | Gpu) -> Gpu:
    """Describe a GPU by preset name, or from the path of a .toml file with a preset's keys; a Gpu is returned as it is.

    Raises
    ------
    InputError
        Unknown name, or a file that is missing or invalid.

    Examples
    --------
    >>> load_gpu("h200").hbm_tb_per_s
    4.8
    """
    if isinstance(name_or_path, Gpu):
        return name_or_path
    if not isinstance(name_or_path, str | Path):
        raise InputError(f"`gpu` {shown(name_or_path)}: must be a name, the path of a .toml file or a Gpu")
    name = str(name_or_path)
    if name.endswith(".toml"):
        fields = {"name": Path(name).stem, **read_toml(Path(name), f"gpu file {name}")}
    elif name.lower() in read_table("gpus.toml"):
        fields = {"name": name.lower(), **read_table("gpus.toml")[name.lower()]}
    else:
        raise unknown(
            "`gpu`", name, read_table("gpus.toml"), " (or the path of a .toml file; `epsim gpus` lists the presets)"
        )
    known = [field.name for field in dataclasses.fields(Gpu)]
    for key in fields:
        if key not in known:
            raise unknown(f"field of gpu {name}", key, known)
    if missing := [key for key in _NEEDED if key not in fields]:
        raise InputError(f"gpu file {name} lacks {missing[0]}")
    marks = fields.get("unverified", [])
    if not isinstance(marks, list):
        raise InputError(f"gpu {name}: unverified must be a list of field names, not {shown(marks)}")
    return Gpu(**(fields | {"unverified": tuple(marks)}))
