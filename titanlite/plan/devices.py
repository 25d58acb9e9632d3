"""The devices that a plan can be made for, and their links. A TOML file can describe another one.

Peaks are dense, from the vendors' data sheets. ``matmul_share`` and ``fp8_share`` say what large matmuls reach of them:
for H100, H200 and MI300X from SemiAnalysis, "MI300X vs H100 vs H200 Benchmark Part 1" (December 2024: 720 and 1280
TFLOP/s on H100, 620 and 990 on MI300X); for the others the share is that of the closest one, and an assumption. The
H100s of torchtitan's runs are limited to 500 W; their clock under load is taken to follow the square root of the power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tomli

from titanlite.errors import ConfigError
from titanlite.registry import nearest


@dataclass(frozen=True)
class Device:
    """A device and its links.

    Attributes:
        memory_gib: the memory that torch reports, in GiB.
        bf16_tflops, fp8_tflops: the dense peaks; 0: there are no units for float8.
        matmul_share, fp8_share: the share of them that large matmuls reach.
        bandwidth_tbs: of the memory, in TB/s, reads and writes together.
        architecture: as compilers spell it; empty: not known.
        processors: streaming multiprocessors, or compute units.
        per_node: devices of one machine.
        link_gbs: GB/s from one device to the others of its machine, in one direction.
        network_gbs: GB/s from one device to another machine, in one direction.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    matmul_share: float
    fp8_share: float
    bandwidth_tbs: float
    architecture: str = ""
    processors: int = 132
    per_node: int = 8
    link_gbs: float = 450.0
    network_gbs: float = 50.0


_H100 = Device("h100", 79.1, 989.5, 1979.0, 0.73, 0.65, 3.35, "sm_90")
_AT_500W = math.sqrt(500 / 700)
DEVICES = {
    device.name: device
    for device in (
        _H100,
        replace(
            _H100,
            name="h100-500w",
            memory_gib=95.0,
            matmul_share=0.73 * _AT_500W,
            fp8_share=0.65 * _AT_500W,
            bandwidth_tbs=2.4,
        ),
        replace(_H100, name="h200", memory_gib=139.8, bandwidth_tbs=4.8),
        Device("a100", 79.1, 312.0, 0.0, 0.80, 0.0, 2.04, "sm_80", processors=108, link_gbs=300.0, network_gbs=25.0),
        Device("b200", 178.0, 2250.0, 4500.0, 0.70, 0.60, 8.0, "sm_100", processors=148, link_gbs=900.0),
        Device("mi300x", 191.5, 1307.4, 2614.9, 0.474, 0.379, 5.3, "gfx942", processors=304, link_gbs=448.0),
        Device("l40s", 44.5, 362.05, 733.0, 0.73, 0.65, 0.864, "sm_89", processors=142, link_gbs=32, network_gbs=12.5),
        Device("4090", 23.6, 165.2, 330.3, 0.90, 0.85, 1.008, "sm_89", processors=128, link_gbs=16.0, network_gbs=3.0),
    )
}


# Cards of another power or memory, such as those for PCIe, have other names, and are not known.
_REPORTED = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA B200": "b200",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X OAM": "mi300x",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "4090",
}


def device_called(reported: str) -> Device | None:
    """Return the device that torch reports by this name; None if it is not known."""
    return DEVICES.get(_REPORTED.get(reported, ""))


def find_device(name: str) -> Device:
    """Return a device of :data:`DEVICES`, or the one that a TOML file of the fields of :class:`Device` describes.

    Raises:
        ConfigError: there is neither; the file has unknown or missing keys, or values that are no positive numbers.
    """
    if name in DEVICES:
        return DEVICES[name]
    path = Path(name).expanduser()
    if path.suffix != ".toml" or not path.is_file():
        known = ", ".join(DEVICES)
        raise ConfigError(
            f"there is no such device{nearest(name, DEVICES)}; it is one of {known}, or a TOML file that describes one",
            key="--device",
            value=name,
        )
    try:
        values = tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as e:
        raise ConfigError(f"cannot be read ({e})", key="--device", value=name) from e
    return _described(values, name)


def _described(values: dict[str, object], file: str) -> Device:
    base = values.pop("base", None)
    known = {field.name: field for field in fields(Device)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{key}: no device has such a key{nearest(key, known)}", key="--device", value=file)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        zero = key in ("fp8_tflops", "fp8_share")
        if key not in ("name", "architecture") and (not number or value < 0 or (value == 0 and not zero)):  # type: ignore[operator]
            raise ConfigError(f"{key} = {value}: must be a number above 0", key="--device", value=file)
    values.setdefault("name", Path(file).stem)
    if base is not None:
        return replace(find_device(str(base)), **values)  # type: ignore[arg-type]
    required = ("memory_gib", "bf16_tflops", "fp8_tflops", "matmul_share", "fp8_share", "bandwidth_tbs")
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: missing; or name a device to begin with, as base", key="--device", value=file
        )
    return Device(**values)  # type: ignore[arg-type]
