"""Streaming DiLoCo: replicas that train alone, and exchange a fragment at a time, in four bits, while they go on.

2025, "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch" (arXiv:2501.18512).

    train(model, shard, config, [StreamingDiLoCo(model, fragments(model, 3), sync_every=30)])   # on each process

DiLoCo trains M replicas for H steps each, and then moves a global copy theta, the same on all of them, by an outer
Nesterov step along the mean of what they changed. Little is sent on average, but all at once, and all wait for it. Here

    after step t with (t - t_p) mod H = 0   delta_m = theta_p - theta_m,p of fragment p is coded and sent to all
    tau steps later                         theta_p <- OuterStep(theta_p, mean over m of the decoded delta_m)
                                            theta_m,p <- alpha theta_m,p + (1 - alpha) theta_p

with t_p = floor(H (p + 1) / P), so that one of P fragments is under way at a time: the largest message is that of the
largest fragment, and what takes less than tau steps is never waited for. Messages are decoded to float32 before they
are summed, by each replica in the same order, so that the global copies stay equal to the last bit. The moments of the
inner optimiser are kept and never sent. P = 1, tau = alpha = 0 without a codec is DiLoCo.

What is sent is the paper's. tau = 1, alpha = 0.5 and an outer rate of 0.4 are its settings as they are remembered; the
orders of fragments, delays and mixes are as torchft has them (there an exchange ends at t_p, here it begins).

Letters: M replicas, P fragments, H steps between two exchanges of a fragment, tau steps that one takes, alpha the mix.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels import e3m0_pack, e3m0_unpack
from workbench.kernels.e3m0 import BLOCKS, sizes
from workbench.lib.core.train import Hook, State

METHOD = Method(
    slug="streaming-diloco",
    title="Streaming DiLoCo with Overlapping Communication: Towards a Distributed Free Lunch",
    family="distributed",
    year=2025,
    paper="arXiv:2501.18512",
    claim="Outer steps exchanged fragment by fragment, overlapped and in four bits keep the quality at a hundredth of "
    "the bandwidth.",
    objects=("StreamingDiLoCo", "fragments", "Schedule", "E3M0Codec", "all_gather"),
    example=None,
    kind=None,
)

ORDERS = ("strided", "sequential")

Arrived = Callable[[], Sequence[Tensor]]
"""Waits for the messages of all M replicas, and gives them in the order of the replicas."""

Gather = Callable[[Tensor], Arrived]
"""Starts to bring a message to all replicas, who all do so with messages of one size."""


def all_gather(group: dist.ProcessGroup | None = None) -> Gather:
    """The `Gather` of torch.distributed, which goes on in the background; None for the group of all processes."""
    if not dist.is_initialized():
        raise InputError("group is of torch.distributed, which is not set up: torchrun or run_processes do that")

    def gather(message: Tensor) -> Arrived:
        found = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
        work = dist.all_gather(found, message, group=group, async_op=True)

        def arrived() -> Sequence[Tensor]:
            work.wait()
            return found

        return arrived

    return gather


def fragments(model: nn.Module, count: int, order: str = "strided") -> list[list[str]]:
    """The trained parameters of a model, by name, in fragments of whole layers.

    Layers are the elements of the longest list of modules that the model has (`nn.ModuleList`, `nn.Sequential`). What
    is outside (embeddings, head, norms) joins the fragment that is smallest without it.

    Args:
        count: P, 1 to the number of layers.
        order: "strided", layer i in fragment i mod P; or "sequential", neighbours together.

    Raises:
        InputError: an order that is none, or a count that the model's layers do not give.
    """
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    longest = max(lists, key=lambda name: len(lists[name]), default=None)
    layers: list[list[str]] = []
    for i in range(len(lists[longest]) if lists else 0):
        inside = f"{longest}.{i}." if longest else f"{i}."
        layers.append([name for name in trained if name.startswith(inside)])
    layers = [layer for layer in layers if layer] or [list(trained)]
    if not 1 <= count <= len(layers):
        raise InputError(f"count is {count} but must be 1 to {len(layers)}, the layers that this model has")
    found: list[list[str]] = [[] for _ in range(count)]
    for i, layer in enumerate(layers):
        found[i % count if order == "strided" else i * count // len(layers)] += layer
    inside_one = {name for part in found for name in part}
    min(found, key=lambda part: sum(map(trained.__getitem__, part))).extend(n for n in trained if n not in inside_one)
    return found


@dataclass(frozen=True)
class Schedule:
    """Which fragment is sent after a step, and which arrives. Steps are counted from 1.

    Attributes:
        count: P.
        sync_every: H, at least P.
        delay: tau, below H / P, so that never two fragments are under way.
    """

    count: int
    sync_every: int
    delay: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} is {value!r} but must be a whole number")
        if self.count < 1:
            raise InputError(f"count is {self.count} but must be at least 1")
        if self.sync_every < self.count:
            raise InputError(f"sync_every is {self.sync_every} but must be at least the {self.count} fragments")
        if not 0 <= self.delay * self.count < self.sync_every:
            most = (self.sync_every - 1) // self.count
            raise InputError(
                f"delay is {self.delay} but must be 0 to {most}: {self.count} fragments are exchanged in "
                f"{self.sync_every} steps, one at a time"
            )

    @property
    def offsets(self) -> list[int]:
        """t_p: the step after which each fragment is sent for the first time."""
        return [self.sync_every * (p + 1) // self.count for p in range(self.count)]

    def sent(self, step: int) -> int | None:
        """The fragment that is sent after this step."""
        at = (step - 1) % self.sync_every + 1
        return self.offsets.index(at) if step > 0 and at in self.offsets else None

    def arriving(self, step: int) -> int | None:
        """The fragment whose exchange ends after this step."""
        return self.sent(step - self.delay)


@dataclass(frozen=True)
class E3M0Codec:
    """Four bits a number and a scale for each block of them: `workbench.kernels.e3m0`.

    A message has the 4 ceil(n / block) bytes of the scales, and then the ceil(n / 2) of the codes.
    """

    block: int = 128

    def __post_init__(self):
        if self.block not in BLOCKS:
            raise InputError(f"block is {self.block} but must be one of {', '.join(map(str, BLOCKS))}")

    @property
    def bits(self) -> float:
        """A number, the scales included."""
        return 4 + 32 / self.block

    def size(self, n: int) -> int:
        n_bytes, n_scales = sizes(n, self.block)
        return n_bytes + 4 * n_scales

    def encode(self, x: Float[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
        codes, scales = e3m0_pack(x, self.block)
        return torch.cat([scales.view(torch.uint8), codes])

    def decode(self, message: UInt8[Tensor, " bytes"], n: int) -> Float[Tensor, " n"]:
        at = 4 * sizes(n, self.block)[1]
        # a copy, for one message among several need not begin where a float32 may
        return e3m0_unpack(message[at:], message[:at].clone().view(torch.float32), n, self.block)


class _UnderWay(NamedTuple):
    fragment: int
    until: int
    message: Tensor
    arrived: Arrived


class StreamingDiLoCo(Hook):
    """One replica's part in it: a hook of its training, or `step()` after each step of a training of one's own.

    All replicas begin with the same weights and settings, and make the same number of steps. Buffers are not exchanged.

    Args:
        model: the replica; its parameters are changed in place.
        fragments: the names of its trained parameters, each in one fragment; see `fragments`.
        sync_every, delay: H and tau, see `Schedule`.
        mix: alpha, how much of its own a replica keeps where a fragment arrives, 0 to 1.
        outer_lr, outer_momentum: of the outer step, Nesterov's; plain SGD where the momentum is 0.
        codec: of the messages; None sends the numbers themselves, as float32 or wider.
        gather: how messages come to all replicas; None for all processes of torch.distributed.

    Raises:
        InputError: a setting that cannot be; a parameter in no fragment, or in two. At the first step: the replicas do
            not begin alike.
    """

    def __init__(
        self,
        model: nn.Module,
        fragments: Sequence[Sequence[str]],
        *,
        sync_every: int,
        delay: int = 1,
        mix: float = 0.5,
        outer_lr: float = 0.4,
        outer_momentum: float = 0.9,
        codec: E3M0Codec | None = None,
        gather: Gather | None = None,
    ):
        self.schedule = Schedule(len(fragments), sync_every, delay)
        if not 0 <= mix <= 1:
            raise InputError(f"mix is {mix} but must be 0 to 1")
        if not 0 < outer_lr < float("inf"):
            raise InputError(f"outer_lr is {outer_lr} but must be above 0")
        if not 0 <= outer_momentum < 1:
            raise InputError(f"outer_momentum is {outer_momentum} but must be 0 or more and below 1")
        self.mix, self.codec = mix, codec
        self.names = [list(part) for part in fragments]
        self._params = _parameters(model, self.names)
        self.globals = [self._local(p) for p in range(len(fragments))]
        self._outer = torch.optim.SGD(self.globals, outer_lr, outer_momentum, nesterov=outer_momentum > 0)
        self.made = 0
        self._under_way: _UnderWay | None = None
        self._gather = all_gather() if gather is None else gather
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self._begun = self._gather(self._start(frozen, outer_lr, outer_momentum))

    def after_step(self, state: State) -> None:
        self.step()

    def step(self) -> None:
        """What is to be done after an inner step: send what is due, wait for what is, and take it over."""
        self.depart()
        self.arrive()

    def depart(self) -> None:
        """The first half of `step`, in which nothing is waited for that is sent in this step."""
        self.made += 1
        self._check_start()
        self.arrive()
        if (p := self.schedule.sent(self.made)) is not None:
            delta = self.globals[p] - self._local(p)
            message = delta if self.codec is None else self.codec.encode(delta)
            self._under_way = _UnderWay(p, self.made + self.schedule.delay, message, self._gather(message))

    def arrive(self) -> None:
        """The second half: takes over the fragment that is due now."""
        if self._under_way is not None and self.made >= self._under_way.until:
            self.flush()

    def flush(self) -> None:
        """Waits for what is under way, if anything is, and takes it over now: for the end of a training."""
        if self._under_way is None:
            return
        p, _, _, arrived = self._under_way
        self._under_way = None
        theta, deltas = self.globals[p], [self._decoded(message, p) for message in arrived()]
        theta.grad = deltas[0].clone()  # the message itself, without a codec
        for delta in deltas[1:]:
            theta.grad += delta
        theta.grad /= len(deltas)
        self._outer.step()
        theta.grad = None
        for local, own in zip(self._params[p], self._split(p), strict=True):
            local.detach().copy_(torch.lerp(own, local.detach().to(own.dtype), self.mix))

    def message_bytes(self, p: int) -> int:
        """Of one replica's message for a fragment."""
        return self.globals[p].nbytes if self.codec is None else self.codec.size(len(self.globals[p]))

    def sent_bytes(self, steps: int, replicas: int) -> list[int]:
        """What a replica sends to the M - 1 others after each of so many steps, from the first."""
        sent = [self.schedule.sent(step) for step in range(1, steps + 1)]
        return [0 if p is None else (replicas - 1) * self.message_bytes(p) for p in sent]

    def global_parameters(self) -> dict[str, Tensor]:
        """The global copy as it stands, by the names of the parameters."""
        parts = [zip(names, self._split(p), strict=True) for p, names in enumerate(self.names)]
        return {name: theta.clone() for part in parts for name, theta in part}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a restart needs beside the replica and its optimiser: steps, copy, momentum, and what is under way.

        It is tensors by name, as safetensors has them.
        """
        state = {"made": torch.tensor(self.made), "fragments": self._digest(self.names)}
        for p, theta in enumerate(self.globals):
            state[f"global.{p}"] = theta.clone()
            if (momentum := self._outer.state[theta].get("momentum_buffer")) is not None:
                state[f"momentum.{p}"] = momentum.clone()
        if self._under_way is not None:
            fragment, until, message, _ = self._under_way
            state |= {"under_way": torch.tensor([fragment, until]), "message": message.clone()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. All replicas load: what was under way is sent again.

        Raises:
            InputError: it is of other fragments, or a message that is under way is of another codec.
        """
        alike = torch.equal(state.get("fragments", torch.empty(0)).cpu(), self._digest(self.names))
        if not alike or any(state[f"global.{p}"].shape != theta.shape for p, theta in enumerate(self.globals)):
            raise InputError(f"state is of other fragments than the {len(self.globals)} that there are")
        if "under_way" in state:
            p, message = int(state["under_way"][0]), state["message"]
            dtype = self.globals[p].dtype if self.codec is None else torch.uint8
            if message.dtype != dtype or message.nbytes != self.message_bytes(p):
                raise InputError(
                    f"state has a message of {message.nbytes} bytes of {message.dtype} under way but must have "
                    f"{self.message_bytes(p)} of {dtype}: it is of another codec"
                )
        if self._begun is not None:  # how they began, with which weights, is of no account any more
            self._begun()
            self._begun = None
        self.made, self._under_way = int(state["made"]), None
        for p, theta in enumerate(self.globals):
            theta.copy_(state[f"global.{p}"])
            self._outer.state.pop(theta, None)
            if (momentum := state.get(f"momentum.{p}")) is not None:
                self._outer.state[theta]["momentum_buffer"] = momentum.to(theta.device, theta.dtype, copy=True)
        if "under_way" in state:
            (fragment, until), message = state["under_way"].tolist(), state["message"].to(self.globals[0].device)
            self._under_way = _UnderWay(fragment, until, message, self._gather(message))

    def _local(self, p: int) -> Tensor:
        """A fragment of the replica, (n,), as float32 or wider."""
        flat = [param.detach().flatten() for param in self._params[p]]
        wide = torch.float32
        for part in flat:
            wide = torch.promote_types(wide, part.dtype)
        return torch.cat([part.to(wide) for part in flat])

    def _split(self, p: int) -> list[Tensor]:
        """The global copy of a fragment, as views of the parameters' shapes."""
        parts = self.globals[p].split([param.numel() for param in self._params[p]])
        return [part.view(param.shape) for part, param in zip(parts, self._params[p], strict=True)]

    def _decoded(self, message: Tensor, p: int) -> Tensor:
        theta = self.globals[p]
        return message if self.codec is None else self.codec.decode(message, len(theta)).to(theta.dtype)

    def _start(self, frozen: Sequence[Tensor], *settings: float) -> Tensor:
        """A digest of all that must be alike where replicas begin."""
        said = (self.schedule, self.mix, self.codec, self.names, settings)
        return self._digest(said, *self.globals, *frozen).to(self.globals[0].device)

    @staticmethod
    def _digest(said: object, *tensors: Tensor) -> UInt8[Tensor, " 32"]:
        digest = hashlib.sha256(repr(said).encode())
        for tensor in tensors:
            digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def _check_start(self) -> None:
        if self._begun is None:
            return
        first, *others = self._begun()
        if other := [i for i, digest in enumerate(others, 1) if not torch.equal(digest, first)]:
            raise InputError(
                f"replicas are {1 + len(others)} but {', '.join(map(str, other))} began with other weights or settings "
                "than replica 0: all must begin alike"
            )
        self._begun = None


def _parameters(model: nn.Module, names: list[list[str]]) -> list[list[nn.Parameter]]:
    """Those of each fragment, when each trained parameter is in one."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = [name for part in names for name in part]
    for part in names:
        for name in part:
            if name not in trained:
                raise unknown("parameter in fragments", name, trained)
            if named.count(name) > 1:
                raise InputError(f"fragments have parameter {name!r} {named.count(name)} times but must have it once")
        if not part:
            raise InputError("fragments has an empty one: each must have a parameter")
    if missing := sorted(trained.keys() - set(named)):
        raise InputError(f"fragments lack parameter {missing[0]!r}: each trained parameter must be in one")
    return [[trained[name] for name in part] for part in names]
