"""What this rank sends to others, counted by the formula of each collective.

    with counted() as traffic:
        step()                                         # forward, backward, torch's own collectives (FSDP2, DTensor)
    traffic.bytes, traffic.of["all_to_all"].messages

With b bytes and n ranks in the group a rank sends: all_to_all its rows for others; all_gather its b to n - 1;
reduce_scatter n - 1 of n parts of b; all_reduce both, 2 b (n - 1) / n; broadcast from the root b to n - 1; send b. That
is the least any algorithm of these sends on average; what goes through the sockets has headers besides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.errors import InputError


@dataclass
class Sent:
    """bytes: that went to other ranks; messages: pieces that they went in, none of them empty; calls: collectives."""

    bytes: float = 0
    messages: int = 0
    calls: int = 0


@dataclass
class Traffic:
    """What a rank sent: `of` by collective, and in all."""

    of: dict[str, Sent] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return sum(sent.bytes for sent in self.of.values())

    @property
    def messages(self) -> int:
        return sum(sent.messages for sent in self.of.values())

    def add(self, kind: str, amounts: Sequence[float]) -> None:
        """A call that sends pieces of these bytes."""
        sent, pieces = self.of.setdefault(kind, Sent()), [amount for amount in amounts if amount]
        sent.bytes += sum(pieces)
        sent.messages += len(pieces)
        sent.calls += 1


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what this rank sends within the block, backward passes included.

    It sees every operator, which costs microseconds each: count in one run and time in another.

    Raises:
        InputError: a collective of which no formula is known.
    """
    traffic = Traffic()
    with _Counting(traffic):
        yield traffic


class _Counting(TorchDispatchMode):
    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and (name := func._opname) not in SILENT:
            given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
            kind = KINDS.get(name.strip("_").removesuffix("_out"))
            if kind is None:
                raise InputError(f"the collective {func} cannot be counted; those that can: {', '.join(sorted(KINDS))}")
            self.traffic.add(kind, PIECES[kind](given, _group(given)))
        return func(*args, **(kwargs or {}))


def _group(given: dict[str, Any]) -> Any:
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    name = given["group_name"]
    return dist.distributed_c10d._resolve_process_group(name) if isinstance(name, str) else name


def _sizes(given: dict[str, Any], *names: str) -> list[int]:
    """Bytes of the tensors of the first of these arguments that is there."""
    leaves = tree_leaves(next(given[name] for name in names if name in given))
    return [one.numel() * one.element_size() for one in leaves if isinstance(one, Tensor)]


def _all_to_all(given: dict[str, Any], group: Any) -> list[float]:
    me, n = group.rank(), group.size()
    if "input_tensors" in given:  # a list
        return [b for to, b in enumerate(_sizes(given, "input_tensors")) if to != me]
    tensor = given["input"]
    rows = list(given["input_split_sizes"]) or [tensor.shape[0] // n] * n
    row = tensor.element_size() * (tensor[0].numel() if tensor.shape[0] else 0)
    return [row * own for to, own in enumerate(rows) if to != me]


def _all_gather(given: dict[str, Any], group: Any) -> list[float]:
    return _sizes(given, "input_tensor", "input_tensors", "inputs", "input") * (group.size() - 1)


def _reduce_scatter(given: dict[str, Any], group: Any) -> list[float]:
    whole = sum(_sizes(given, "input_tensor", "input_tensors", "inputs", "input"))
    return [whole / group.size()] * (group.size() - 1)


def _all_reduce(given: dict[str, Any], group: Any) -> list[float]:
    whole = sum(_sizes(given, "tensors", "inputs", "input"))
    return [whole / group.size()] * (2 * (group.size() - 1))


def _broadcast(given: dict[str, Any], group: Any) -> list[float]:
    root = given["root_rank"] if "root_rank" in given else dist.get_group_rank(group, given["src"])
    return _sizes(given, "tensors", "input") * (group.size() - 1) if root == group.rank() else []


def _send(given: dict[str, Any], group: Any) -> list[float]:
    return _sizes(given, "tensors", "tensor")


PIECES = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "send": _send,
}
KINDS = {
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "allgather": "all_gather",
    "allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "send": "send",
    "isend": "send",
}
SILENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv", "wait_tensor", "_wrap_tensor_autograd")
"""Operators that send no tensor: the other side's, or none's."""
