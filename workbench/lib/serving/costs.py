"""What a pass costs on each resource: by the numbers of a machine, or by times measured here.

A pass of n tokens goes through L layers. Each layer's weights come over the link; the device computes queries, keys and
values, the attention of prefills, and after attention the output projection and the experts; the CPU attends for
decodes over the keys and values in host memory.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.serving.paging import Share

STREAM, DEVICE, ATTENTION, HOST = TERMS = ("stream", "device", "attention", "host memory")
"""What can bound a pass: the weights over the link, the device, the CPU's attention, the host memory both read."""


@dataclass(frozen=True)
class HardwareSpec:
    """What a model of serving needs of a machine.

    Attributes:
        flops: FLOP/s that the device reaches.
        link_bandwidth: bytes/s from host to device.
        host_bandwidth: bytes/s of host memory, which stream and attention share.
        attention_bandwidth: bytes/s of keys and values that the CPU attends over.
        kv_bytes: host memory for keys and values.
        basis: what the numbers are, as it stands on figures.
    """

    flops: float
    link_bandwidth: float
    host_bandwidth: float
    attention_bandwidth: float
    kv_bytes: float
    basis: str = "simulated, calibrated by hand"

    def __post_init__(self):
        for name in ("flops", "link_bandwidth", "host_bandwidth", "attention_bandwidth", "kv_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value} but must be a finite number above 0")
        if self.link_bandwidth > self.host_bandwidth:
            raise InputError(
                f"link_bandwidth is {self.link_bandwidth:.4g} but must be at most host_bandwidth = "
                f"{self.host_bandwidth:.4g}, from which it reads"
            )

    @classmethod
    def of(cls, machine: Hardware, moe: "MoESpec", memory_bytes: float | None = None) -> "HardwareSpec":
        """A machine that keeps the model and, in the rest of its host memory, keys and values.

        `memory_bytes` replaces the host's memory. The CPU is taken to attend as fast as it can read.

        Raises:
            InputError: the machine says nothing of its device, host or link; or the model leaves no memory.
        """
        machine.need("device", "host", "link")
        memory = machine.host.memory_bytes if memory_bytes is None else memory_bytes
        if memory <= moe.total_bytes:
            raise InputError(
                f"memory_bytes is {memory:.4g} but must be above the {moe.total_bytes:.4g} bytes of the weights"
            )
        bandwidth = machine.host.memory_bandwidth
        kv_bytes = memory - moe.total_bytes
        return cls(machine.device.flops, machine.link.bandwidth, bandwidth, bandwidth, kv_bytes, machine.label)


@dataclass(frozen=True)
class MoESpec:
    """A decoder of mixture-of-experts layers with SwiGLU experts; sizes in elements, `width` bytes each.

    Routers, norms and positions are not counted. The embedding and the head stay on the device.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    experts: int
    top_k: int
    vocab: int
    width: int = 2

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1 or value != int(value):
                raise InputError(f"{name} is {value} but must be a whole number of at least 1")
        if self.top_k > self.experts:
            raise InputError(f"top_k is {self.top_k} but must be at most experts = {self.experts}")

    @property
    def projection_params(self) -> int:
        """Of queries, keys, values and the output, in one layer."""
        return self.dim * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_params(self) -> int:
        """Of one expert."""
        return 3 * self.dim * self.hidden

    @property
    def layer_bytes(self) -> int:
        """What streams for one layer."""
        return self.width * (self.projection_params + self.experts * self.expert_params)

    @property
    def total_bytes(self) -> int:
        """What streams in one pass."""
        return self.layers * self.layer_bytes

    @property
    def token_flops(self) -> int:
        """Of one token through all layers, without attention: 2 FLOP for each active parameter."""
        return 2 * self.layers * (self.projection_params + self.top_k * self.expert_params)

    @property
    def pair_flops(self) -> int:
        """Of one query on one key, and its value, in all heads and layers."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.width * self.layers * self.kv_heads * self.head_dim


MIXTRAL = MoESpec(
    layers=32, dim=4096, heads=32, kv_heads=8, head_dim=128, hidden=14336, experts=8, top_k=2, vocab=32000
)
"""Mixtral 8x7B (2401.04088, table 1) in bfloat16."""


@runtime_checkable
class Costs(Protocol):
    """Seconds of the parts of a pass. `shares` are those of one micro-group."""

    basis: str
    layers: int

    def load(self) -> float:
        """The weights of one layer over the link."""

    def qkv(self, shares: Sequence[Share]) -> float:
        """One layer on the device up to attention, that of prefills included."""

    def attend(self, shares: Sequence[Share]) -> float:
        """One layer's attention of the decodes, on the CPU."""

    def moe(self, shares: Sequence[Share]) -> float:
        """One layer on the device after attention."""

    def head(self, shares: Sequence[Share]) -> float:
        """Logits and what comes before the first layer, on the device."""

    def host(self, shares: Sequence[Share]) -> float:
        """What host memory alone asks of a whole pass, for the stream and attention together."""

    def crowded(self, device: float, attention: float) -> tuple[float, float]:
        """Seconds of device and CPU in a pass in which both work, of what each takes alone."""


@dataclass(frozen=True)
class SpecCosts:
    """Costs by the numbers of a machine, in proportion to tokens, bytes and FLOPs."""

    machine: HardwareSpec
    moe_spec: MoESpec

    @property
    def basis(self) -> str:
        return self.machine.basis

    @property
    def layers(self) -> int:
        return self.moe_spec.layers

    def load(self) -> float:
        return self.moe_spec.layer_bytes / self.machine.link_bandwidth

    def qkv(self, shares: Sequence[Share]) -> float:
        spec = self.moe_spec
        into = 2 * spec.dim * spec.head_dim * (spec.heads + 2 * spec.kv_heads)
        return (tokens(shares) * into + prefill_pairs(shares) * spec.pair_flops / spec.layers) / self.machine.flops

    def attend(self, shares: Sequence[Share]) -> float:
        return read_tokens(shares) * self.moe_spec.kv_bytes_per_token / self.layers / self.machine.attention_bandwidth

    def moe(self, shares: Sequence[Share]) -> float:
        spec = self.moe_spec
        flops = 2 * (spec.dim * spec.head_dim * spec.heads + spec.top_k * spec.expert_params)
        return tokens(shares) * flops / self.machine.flops

    def head(self, shares: Sequence[Share]) -> float:
        return 2 * len(shares) * self.moe_spec.dim * self.moe_spec.vocab / self.machine.flops

    def host(self, shares: Sequence[Share]) -> float:
        spec = self.moe_spec
        return (spec.total_bytes + read_tokens(shares) * spec.kv_bytes_per_token) / self.machine.host_bandwidth

    def crowded(self, device: float, attention: float) -> tuple[float, float]:
        return device, attention


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs by times measured on one machine, as `calibrate` takes them.

    Attributes:
        streamed: seconds of one layer's weights by its bytes.
        layer_bytes: of one layer.
        products_in, products_out: one layer's products before and after attention, by tokens.
        prefill: one layer's attention of one prompt, by its length.
        decode_call: one layer's attention of decodes, whatever is attended over.
        decode: and for each part of it, of one number of pages, by the tokens of those pages.
        cached_tokens: whose keys and values are attended over at once.
        output: head and embedding, by requests.
        hand_over: seconds from the end of one task to the start of the next that waited for it.
        crowd: how many times longer the device takes while the CPU works, and the CPU while the device does.
        page: tokens of a page.
    """

    basis: str
    layers: int
    page: int
    cached_tokens: int
    layer_bytes: int
    streamed: LinkModel
    products_in: RateTable
    products_out: RateTable
    prefill: RateTable
    decode_call: float
    decode: LinkModel
    output: RateTable
    hand_over: float
    crowd: tuple[float, float]

    def load(self) -> float:
        return self.streamed.seconds(self.layer_bytes) + self.hand_over

    def qkv(self, shares: Sequence[Share]) -> float:
        prompts = sum(self.prefill.seconds(share.tokens) for share in shares if not share.decodes)
        return self.products_in.seconds(tokens(shares)) + prompts + self.hand_over

    def attend(self, shares: Sequence[Share]) -> float:
        """Decodes that have one number of pages are attended together, as many at once as stay in a core's cache."""
        classes: dict[int, int] = {}
        for share in shares:
            if share.decodes:
                classes[len(share.pages)] = classes.get(len(share.pages), 0) + 1
        if not classes:
            return 0.0
        parts = sum(self._together(m * self.page, n) for m, n in classes.items())
        return self.decode_call + parts + self.hand_over

    def _together(self, held: int, requests: int) -> float:
        most = max(1, self.cached_tokens // held)
        return requests // most * self.decode.seconds(most * held) + self.decode.seconds(requests % most * held)

    def moe(self, shares: Sequence[Share]) -> float:
        return self.products_out.seconds(tokens(shares)) + self.hand_over

    def head(self, shares: Sequence[Share]) -> float:
        return self.output.seconds(len(shares)) + self.hand_over

    def host(self, shares: Sequence[Share]) -> float:
        """What is shared was measured while it was: it is in `crowd`."""
        return 0.0

    def crowded(self, device: float, attention: float) -> tuple[float, float]:
        """For as long as the shorter of the two lasts, both are slower."""
        shared, (slow_device, slow_cpu) = min(device, attention), self.crowd
        return device + (slow_device - 1) * shared, attention + (slow_cpu - 1) * shared

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        found = dict(vars(self))
        for name in _LINES:
            found[name] = {"alpha": found[name].alpha, "beta": found[name].beta}
        return found | {name: found[name].to_dict() for name in _TABLES}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "MeasuredCosts":
        """The inverse of `to_dict`."""
        lines = {name: LinkModel(**found[name]) for name in _LINES}
        tables = {name: RateTable.from_dict(found[name]) for name in _TABLES}
        return cls(**{**found, **lines, **tables, "crowd": tuple(found["crowd"])})


_LINES = ("streamed", "decode")
_TABLES = ("products_in", "products_out", "prefill", "output")


def tokens(shares: Iterable[Share]) -> int:
    """Tokens that go through the products."""
    return sum(share.tokens for share in shares)


def prefill_pairs(shares: Iterable[Share]) -> int:
    """Pairs of a query and a key that it sees, of all prefills: p (p + 1) / 2 each."""
    return sum(share.tokens * (share.tokens + 1) // 2 for share in shares if not share.decodes)


def read_tokens(shares: Iterable[Share]) -> int:
    """Tokens whose keys and values are read for decodes, the new one among them."""
    return sum(share.start + 1 for share in shares if share.decodes)


def pass_terms(costs: Costs, shares: Sequence[Share]) -> dict[str, float]:
    """Seconds that each resource alone takes for a pass, by the names of `TERMS`; its time is the largest of them.

    Device and CPU work at once only where there are two micro-groups.
    """
    groups = sorted({share.group for share in shares})
    parts = [[share for share in shares if share.group == group] for group in groups]
    device = sum(costs.layers * (costs.qkv(part) + costs.moe(part)) + costs.head(part) for part in parts)
    attention = costs.layers * sum(costs.attend(part) for part in parts)
    if len(parts) > 1:
        device, attention = costs.crowded(device, attention)
    return {STREAM: costs.layers * costs.load(), DEVICE: device, ATTENTION: attention, HOST: costs.host(shares)}


def stretches(costs: Costs, shares: Sequence[Share]) -> tuple[float, float]:
    """By how much the device's and the CPU's tasks of a pass are longer than each alone.

    They crowd each other; and where stream and attention together ask more of host memory than either alone takes,
    attention lasts for what they take together.
    """
    groups = {share.group for share in shares}
    alone = [pass_terms(costs, [share for share in shares if share.group == group]) for group in groups]
    device, attention = (sum(terms[name] for terms in alone) for name in (DEVICE, ATTENTION))
    both = pass_terms(costs, shares)
    last = both[ATTENTION] if both[HOST] <= both[STREAM] else max(both[ATTENTION], both[HOST])
    return both[DEVICE] / device if device else 1.0, last / attention if attention else 1.0
