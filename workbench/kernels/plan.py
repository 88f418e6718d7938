"""How routed pairs are put in expert order: the index tensors that every grouped operator reads.

Tensor letters: T tokens, E experts, P routed (token, expert) pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from workbench.errors import InputError

MOST_EXPERTS = 2**24  # a plan has a number for each, whether it has pairs or not
MOST_ROWS = 2**16  # of a tile


@dataclass(frozen=True)
class RoutePlan:
    """The P pairs of T tokens, sorted by expert, with the way back. All tensors are int32 on one device.

    Pairs are token-major: those of token 0 come first. A grouped row is a pair in expert order; rows of one expert
    keep their token order. Scores are no part of the plan: they are differentiable, and stay token-major.

    Attributes:
        order: (P,) pair of each grouped row.
        inv: (P,) grouped row of each pair.
        tok: (P,) token of each grouped row.
        offs: (E + 1,) first grouped row of each expert.
        tok_offs: (T + 1,) first pair of each token; None where every token has `top_k` pairs.
        n_tokens: T.
        n_experts: E.
        top_k: pairs of every token, None where their number varies.
    """

    order: Int32[Tensor, " pairs"]
    inv: Int32[Tensor, " pairs"]
    tok: Int32[Tensor, " pairs"]
    offs: Int32[Tensor, " experts_plus_1"]
    tok_offs: Int32[Tensor, " tokens_plus_1"] | None
    n_tokens: int
    n_experts: int
    top_k: int | None

    @classmethod
    def build(
        cls,
        expert: Int[Tensor, " pairs"],
        n_experts: int,
        *,
        top_k: int | None = None,
        tok_offs: Int[Tensor, " tokens_plus_1"] | None = None,
    ) -> "RoutePlan":
        """The plan of token-major pairs.

        Args:
            expert: (P,) expert of each pair, 0..E-1. On a CPU the values are checked; on other devices that would make
                the host wait for them, and it is the caller who sees to it.
            n_experts: E.
            top_k: pairs of every token, where their number is fixed.
            tok_offs: (T + 1,) first pair of each token, where it is not. Exactly one of the two is given.

        Raises:
            InputError: names the argument that does not fit.
        """
        n_tokens = check(expert, n_experts, top_k, tok_offs)
        device, n_pairs = expert.device, expert.shape[0]
        check_values(expert, n_experts, tok_offs)
        by_expert, order = torch.sort(expert, stable=True)
        position = torch.arange(n_pairs, device=device, dtype=torch.int32)
        inv = torch.empty_like(position).scatter_(0, order, position)
        bounds = torch.arange(n_experts + 1, device=device, dtype=expert.dtype)
        offs = torch.searchsorted(by_expert, bounds, out_int32=True)
        if top_k is not None:
            order = order.to(torch.int32)
            return cls(order, inv, order // top_k, offs, None, n_tokens, n_experts, top_k)
        tokens = torch.arange(n_tokens, device=device, dtype=torch.int32)
        token = torch.repeat_interleave(tokens, tok_offs.diff(), output_size=n_pairs)
        return cls(order.to(torch.int32), inv, token[order], offs, tok_offs.to(torch.int32), n_tokens, n_experts, None)

    @property
    def n_pairs(self) -> int:
        return self.order.shape[0]

    def require_form(self) -> None:
        """Raise `InputError` unless types, shapes and numbers are those of a plan that `build` makes."""
        n_pairs, device = self.order.numel(), self.order.device
        sizes = {"order": n_pairs, "inv": n_pairs, "tok": n_pairs, "offs": self.n_experts + 1}
        if self.tok_offs is not None:
            sizes["tok_offs"] = self.n_tokens + 1
        for name, size in sizes.items():
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,) or tensor.device != device:
                raise InputError(
                    f"plan.{name} is {_shown(tensor)} on {tensor.device} but must be torch.int32 of shape ({size},) on "
                    f"{device}, for {self.n_tokens} tokens, {self.n_experts} experts and {n_pairs} pairs"
                )
            if not tensor.is_contiguous():
                raise InputError(f"plan.{name} has strides {tensor.stride()} but must be contiguous")
        if (self.top_k is None) == (self.tok_offs is None):
            raise InputError(
                f"plan.top_k is {self.top_k} and plan.tok_offs is {_shown(self.tok_offs)} but exactly one of them must "
                "be given"
            )
        if self.top_k is not None and (self.top_k < 1 or self.top_k * self.n_tokens != n_pairs):
            raise InputError(f"plan.top_k is {self.top_k} but {self.n_tokens} tokens have {n_pairs} pairs")

    def require(self, fits: Callable[["RoutePlan"], bool] | None = None) -> None:
        """Raise `InputError` unless this is, to the last number, a plan that `build` makes.

        Operators ask when a plan enters, for they read and write where it points. Values are read on a CPU only: on
        other devices that would make the host wait for them, and it is the caller who sees to it.

        Args:
            fits: a faster way to tell whether the values of a plan whose form is right are right.
        """
        self.require_form()
        if self.order.device.type == "cpu" and not (fits is not None and fits(self)):
            self._require_values()
            if fits is not None:
                raise InputError("plan is none that RoutePlan.build makes")

    def _require_values(self) -> None:
        order, inv, tok, offs = (tensor.numpy() for tensor in (self.order, self.inv, self.tok, self.offs))
        first = None if self.tok_offs is None else self.tok_offs.numpy()
        for name, bounds in (("offs", offs), ("tok_offs", first)):
            if bounds is not None and (bounds[0] != 0 or bounds[-1] != len(order) or (bounds[1:] < bounds[:-1]).any()):
                raise InputError(
                    f"plan.{name} must rise from 0 to the number of pairs, {len(order)}; it begins with "
                    f"{bounds[:4].tolist()} and ends with {bounds[-4:].tolist()}"
                )
        if not len(order):
            return
        for name, values, end in (("order", order, len(order)), ("inv", inv, len(order)), ("tok", tok, self.n_tokens)):
            if values.view("uint32").max() >= end:  # a negative one is larger than all
                raise InputError(
                    f"plan.{name} holds values from {values.min()} to {values.max()} but all must be from 0 to "
                    f"{end - 1}"
                )
        place = torch.arange(len(order), dtype=torch.int32).numpy()
        if (inv[order] != place).any():
            raise InputError("plan.order must hold every pair once, and plan.inv the grouped row of each")
        token = order // self.top_k if first is None else first.searchsorted(order, side="right") - 1
        if (tok != token).any():
            raise InputError("plan.tok must hold the token of the pair in each grouped row")
        begins = (place[1:] == offs[offs.searchsorted(place[1:])]) | (order[1:] > order[:-1])
        if not begins.all():
            raise InputError("plan.order must hold the pairs of one expert in their order")

    def token_offsets(self) -> Int32[Tensor, " tokens_plus_1"]:
        """(T + 1,) first pair of each token, also where their number is fixed."""
        if self.tok_offs is not None:
            return self.tok_offs
        return torch.arange(0, self.n_pairs + 1, self.top_k, device=self.order.device, dtype=torch.int32)

    def tiles(self, block_m: int) -> tuple[Int32[Tensor, " tiles"], Int32[Tensor, " tiles"]]:
        """The grouped rows cut into tiles of at most `block_m` rows of one expert.

        Returns:
            tile_expert (Nt,) and tile_row (Nt,), the first grouped row of each tile; a tile ends after `block_m` rows
            or with its expert. Nt = P // block_m + E bounds the number of tiles without asking the device for it; the
            unused ones, at the end, hold -1 in both.
        """
        if not 1 <= block_m <= MOST_ROWS:
            raise InputError(f"block_m is {block_m} but must be from 1 to {MOST_ROWS}")
        counts = self.offs.diff()
        ends = ((counts + (block_m - 1)) // block_m).cumsum(0, dtype=torch.int32)
        tile = torch.arange(self.n_pairs // block_m + self.n_experts, device=ends.device, dtype=torch.int32)
        expert = torch.searchsorted(ends, tile, right=True, out_int32=True)
        used = expert < self.n_experts
        owner = expert.clamp(max=self.n_experts - 1)
        first = torch.cat([ends.new_zeros(1), ends])[owner]
        row = self.offs[owner] + (tile - first) * block_m
        return torch.where(used, expert, -1), torch.where(used, row, -1)


def check(expert: Tensor, n_experts: int, top_k: int | None, tok_offs: Tensor | None) -> int:
    """What shapes and types can tell; returns the number of tokens."""
    if expert.ndim != 1 or expert.dtype.is_floating_point or expert.dtype == torch.bool:
        raise InputError(f"expert is {_shown(expert)} but must be integers of shape (pairs,)")
    n_pairs = expert.shape[0]
    if not 1 <= n_experts <= MOST_EXPERTS:
        raise InputError(f"n_experts is {n_experts} but must be from 1 to {MOST_EXPERTS}")
    if n_pairs >= 2**31:
        raise InputError(
            f"expert holds {n_pairs} pairs but a plan, whose indices are int32, must have fewer than 2**31"
        )
    if (top_k is None) == (tok_offs is None):
        raise InputError(f"top_k is {top_k} and tok_offs is {_shown(tok_offs)} but exactly one of them must be given")
    if tok_offs is not None:
        if tok_offs.ndim != 1 or tok_offs.shape[0] < 1 or tok_offs.dtype not in (torch.int32, torch.int64):
            raise InputError(f"tok_offs is {_shown(tok_offs)} but must be int32 or int64 of shape (tokens + 1,)")
        if tok_offs.device != expert.device:
            raise InputError(f"tok_offs is on {tok_offs.device} but must be where expert is, on {expert.device}")
        return tok_offs.shape[0] - 1
    if top_k < 1 or n_pairs % top_k:
        raise InputError(f"top_k is {top_k} but must be at least 1 and divide the number of pairs, {n_pairs}")
    return n_pairs // top_k


def check_values(expert: Tensor, n_experts: int, tok_offs: Tensor | None) -> None:
    """What only the values can tell, where reading them costs nothing."""
    if expert.device.type != "cpu" or torch.compiler.is_compiling():
        return
    n_pairs = expert.shape[0]
    low, high = map(int, expert.aminmax()) if n_pairs else (0, 0)
    if low < 0 or high >= n_experts:
        raise InputError(
            f"expert holds values from {low} to {high} but all must be from 0 to n_experts - 1 = {n_experts - 1}"
        )
    if tok_offs is not None and (
        int(tok_offs[0]) != 0 or int(tok_offs[-1]) != n_pairs or bool((tok_offs.diff() < 0).any())
    ):
        raise InputError(
            f"tok_offs must rise from 0 to the number of pairs, {n_pairs}; it begins with {tok_offs[:4].tolist()} "
            f"and ends with {tok_offs[-4:].tolist()}"
        )


def _shown(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
