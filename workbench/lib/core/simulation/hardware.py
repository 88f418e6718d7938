"""The numbers of a machine that a simulation runs on: read from a file of a user's own, or the public ones of a device.

    machine = Hardware.read("mine.json")
    machine = Hardware.named("a40-pcie4")          # names()

The file is JSON: {"name", "basis": "specified" or "measured", "source", and any of the parts below}. A part that is
there has all its numbers, in SI units (bytes, bytes/s, FLOP/s, s), each from 1 to 1e24 and a latency from 0 to 3600:
beyond that times are no longer told apart, and a unit is wrong. What was measured and what a maker specifies are
never in one file, and never in one column of a table.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from workbench.errors import InputError, unknown
from workbench.lib.core.simulation.fits import LinkModel

DEVICES = Path(__file__).parent / "devices.json"
BASES = ("specified", "measured")


@dataclass(frozen=True)
class Processor:
    """What computes, with its memory; `flops` is what products of matrices reach, in the format that is used."""

    flops: float
    memory_bytes: float
    memory_bandwidth: float


@dataclass(frozen=True)
class Channel:
    """What bytes go through, in one direction, from one device."""

    bandwidth: float
    latency_seconds: float

    @property
    def model(self) -> LinkModel:
        """Seconds of a message by its bytes."""
        return LinkModel(self.latency_seconds, 1 / self.bandwidth)


@dataclass(frozen=True)
class Hardware:
    """A machine, or as much of it as is known.

    Attributes:
        device, host: the accelerator and the processor beside it.
        link: between host and device.
        disk: to the host's memory.
        node: between two devices of a node.
        network: between two devices of different nodes.
        devices_per_node: of `node`.
    """

    name: str
    basis: str
    source: str
    device: Processor | None = None
    host: Processor | None = None
    link: Channel | None = None
    disk: Channel | None = None
    node: Channel | None = None
    network: Channel | None = None
    devices_per_node: int | None = None

    @classmethod
    def read(cls, file: str | Path) -> "Hardware":
        """The machine in a file.

        Raises:
            InputError: it cannot be read, or a key is missing, unknown or there twice, or a number is none or out of
                range; the key is named.
        """
        where = f"hardware {str(file)!r}"
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=partial(_once, where))
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror}") from None
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        return cls.from_dict(found, where=where)

    @classmethod
    def named(cls, name: str) -> "Hardware":
        """A machine by public specifications."""
        found = _devices()
        if name not in found:
            raise unknown("hardware", name, found)
        return cls.from_dict({"name": name, "basis": "specified"} | found[name], where=f"hardware {name!r}")

    @classmethod
    def from_dict(cls, found: Any, where: str = "hardware") -> "Hardware":
        """The inverse of `to_dict`."""
        found = _object(found, where)
        _known(found, [field.name for field in fields(cls)], where)
        texts = {key: _text(found, key, where) for key in ("name", "basis", "source")}
        if texts["basis"] not in BASES:
            raise InputError(f"{where}: basis is {texts['basis']!r} but must be one of {', '.join(BASES)}")
        parts: dict[str, Any] = {
            name: _part(kind, found[name], f"{where}: {name}") for name, kind in PARTS.items() if name in found
        }
        if "devices_per_node" in found:
            count = _number(found, "devices_per_node", where)
            if count != int(count):
                raise InputError(f"{where}: devices_per_node is {count} but must be a whole number")
            parts["devices_per_node"] = int(count)
        if not parts:
            raise InputError(f"{where} describes nothing: it must have one or more of {', '.join(PARTS)}")
        return cls(**texts, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the file has them."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def need(self, *parts: str) -> "Hardware":
        """Itself; `InputError` names the parts that a simulation needs and this machine does not say."""
        if missing := [part for part in parts if getattr(self, part) is None]:
            raise InputError(f"hardware {self.name!r} must have {', '.join(missing)} but says nothing of it")
        return self

    @property
    def label(self) -> str:
        """What stands on every figure and table that was made with it."""
        return f"simulated, calibrated by {self.name} ({self.basis})"


PARTS = {"device": Processor, "host": Processor} | dict.fromkeys(("link", "disk", "node", "network"), Channel)


def names() -> tuple[str, ...]:
    """The machines of `Hardware.named`."""
    return tuple(_devices())


def _devices() -> dict[str, dict]:
    return json.loads(DEVICES.read_text(encoding="utf-8"))


def _part(kind: type, found: Any, where: str) -> Any:
    keys = [field.name for field in fields(kind)]
    _known(_object(found, where), keys, where)
    return kind(**{key: _number(found, key, where) for key in keys})


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON has as an object; of a key that is there twice Python would take the last in silence."""
    found = dict(pairs)
    for key in found:
        if sum(key == other for other, _ in pairs) > 1:
            raise InputError(f"{where}: key {key!r} is there twice")
    return found


def _object(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where} is {found!r:.60} but must be an object with keys")
    return found


def _known(found: Mapping[str, Any], keys: list[str], where: str) -> None:
    for key in found:
        if key not in keys:
            raise unknown(f"{where}: key", key, keys)


def _value(found: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in found:
        raise InputError(f"{where}: key {key!r} is missing")
    return found[key]


def _text(found: Mapping[str, Any], key: str, where: str) -> str:
    value = _value(found, key, where)
    if not (isinstance(value, str) and value.strip() and value.isprintable()):
        raise InputError(f"{where}: {key} is {value!r} but must be a line of text")
    return value


def _number(found: Mapping[str, Any], key: str, where: str) -> float:
    value = _value(found, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {key} is {value!r} but must be a number")
    low, high = (0, 3600) if key.startswith("latency") else (1, 1e24)
    if not low <= value <= high:  # NaN is neither
        raise InputError(f"{where}: {key} is {value!r:.40} but must be from {low} to {high:g}")
    return float(value)
