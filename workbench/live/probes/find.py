"""Where to look in a model, whoever wrote it: its mixture-of-experts blocks, its matrices, its parameter groups.

Blocks are recognised by what they are, not by a list of models:

- `Announcing`, such as `MoELayer` or an attention that chooses blocks of keys;
- a router module with integers `num_experts` and `top_k` whose forward returns logits (N, E) and indices (N, K), as in
  transformers 5;
- a block with `experts`, an integer `top_k` and a plain linear `gate` or `router`, as in transformers 4.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.meters import Member

Observer = Callable[["Block", Routing, Context], None]
GATES = ("gate", "router")


@dataclass(frozen=True)
class Block:
    """One mixture-of-experts block of a model.

    Attributes:
        name: of the block in the model.
        router: name of its router inside the block; "" for a block that decides by itself.
        n_experts, top_k: E, and K or None where it varies.
    """

    name: str
    module: nn.Module = field(repr=False)
    router: str
    n_experts: int
    top_k: int | None

    def observe(self, observer: Observer, wanted: Callable[["Block"], bool]) -> Callable[[], None]:
        """Call `observer(block, routing, context)` after each `wanted` forward, until the returned function is called.

        The routing of a block that announces none is put together from its router's output: the indices where it
        gives them, else the top K of its logits; `probs` is the softmax of the logits, whatever the rule makes of them.
        """
        if isinstance(self.module, Announcing):

            def seen(module: Announcing, routing: Routing, context: Context) -> None:
                if wanted(self):
                    observer(self, routing, context)

            return self.module.observe(seen).remove

        def after(module: nn.Module, inputs: tuple, output: Any) -> None:
            routing = self._routing(output if isinstance(output, tuple) else (output,)) if wanted(self) else None
            if routing is not None:
                observer(self, routing, Context())

        return self.module.get_submodule(self.router).register_forward_hook(after).remove

    def _routing(self, output: tuple) -> Routing | None:
        tensors = [part.detach().flatten(0, -2) for part in output if isinstance(part, Tensor) and part.ndim >= 2]
        floats = [part for part in tensors if part.is_floating_point() and part.shape[1] == self.n_experts]
        if not floats:
            return None
        # where a router returns its scores as well, the logits are the ones that are not all positive
        logits = next((part for part in floats if bool((part < 0).any()) and bool(part.isfinite().all())), floats[0])
        probs = logits.float().softmax(-1)
        found = [part for part in tensors if not part.is_floating_point() and part.shape[1] <= self.n_experts]
        indices = found[0].long() if found else logits.topk(self.top_k, dim=-1).indices
        return Routing.fixed(indices, probs.gather(1, indices), self.n_experts, probs=probs, logits=logits)


def blocks(model: nn.Module) -> list[Block]:
    """The mixture-of-experts blocks of a model, in its order."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Announcing):
            router = "router" if isinstance(getattr(module, "router", None), nn.Module) else ""
            found.append(Block(name, module, router, module.n_experts, module.top_k))
        elif _is_router(module):
            parent, _, router = name.rpartition(".")
            found.append(Block(parent, model.get_submodule(parent), router, module.num_experts, module.top_k))
        elif hasattr(module, "experts") and _is_int(getattr(module, "top_k", None)):
            gates = [gate for gate in GATES if isinstance(getattr(module, gate, None), nn.Linear)]
            if gates and not _is_router(getattr(module, gates[0])):
                n_experts = getattr(module, gates[0]).out_features
                found.append(Block(name, module, gates[0], n_experts, module.top_k))
    return found


def _is_router(module: nn.Module) -> bool:
    """A module of its own that routes: its class says so, it knows E and K, and it has no experts itself."""
    named = any(word in type(module).__name__.lower() for word in GATES)
    counted = _is_int(getattr(module, "num_experts", None)) and _is_int(getattr(module, "top_k", None))
    return named and counted and not hasattr(module, "experts") and not isinstance(module, Announcing)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MOST_EXPERTS = 16
"""Experts of a bank of low-rank experts up to which each of them is a group of parameters of its own."""


def groups(model: nn.Module, found: list[Block]) -> dict[str, list[Member]]:
    """The trained parameters in groups by their part in the model, each parameter, or slice of one, in one.

    Of a mixture-of-experts block "router", "experts" and "shared" (what every token passes), and of low-rank experts
    each one, "experts.0" and so on; of a numbered layer around a block "attention" (the rest, norms included); a block
    without a router and a numbered layer without a block as a whole; everything else is the "trunk" (embeddings, last
    norm, head).
    """
    banks = [module for module in model.modules() if isinstance(module, LowRankExperts)]
    of_bank = {p: len(p) for bank in banks for p in bank.parameters() if len(p) == bank.n_experts <= MOST_EXPERTS}
    result: dict[str, list[Member]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group(name, found)
            if parameter in of_bank and group.rpartition(".")[2] == "experts":
                for expert in range(of_bank[parameter]):
                    result.setdefault(f"{group}.{expert}", []).append((parameter, expert))
            else:
                result.setdefault(group, []).append(parameter)
    return result


def size(group: list[Member]) -> int:
    """Number of parameters in a group."""
    return sum((member if isinstance(member, nn.Parameter) else member[0][member[1]]).numel() for member in group)


def _group(name: str, found: list[Block]) -> str:
    for block in found:
        inside = name.removeprefix(f"{block.name}." if block.name else "")
        if inside != name or not block.name:
            if not block.router:
                return block.name or "trunk"
            parts = {block.router: "router", "experts": "experts"}
            part = next((what for prefix, what in parts.items() if inside.startswith(f"{prefix}.")), "shared")
            return f"{block.name}.{part}".lstrip(".")
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    if numbered is None:
        return "trunk"
    layer = numbered.group()
    return (
        f"{layer}.attention" if any(block.router and block.name.startswith(f"{layer}.") for block in found) else layer
    )


@dataclass(frozen=True)
class Matrix:
    """One matrix (o, i) inside a trained parameter, for the parameter itself, its gradient or its change alike."""

    name: str
    parameter: nn.Parameter = field(repr=False)
    pick: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.pick(self.parameter).shape)


@dataclass(frozen=True)
class LowRank:
    """A pair of trained factors whose product scale * B A is what is watched (LoRA).

    Attributes:
        expert: which of several in the same two parameters; None where the parameters are this pair alone.
    """

    name: str
    parameters: tuple[nn.Parameter, nn.Parameter] = field(repr=False)
    scale: float
    expert: int | None = None

    @property
    def a(self) -> Tensor:
        return self._part(0)

    @property
    def b(self) -> Tensor:
        return self._part(1)

    def _part(self, i: int) -> Tensor:
        return (self.parameters[i] if self.expert is None else self.parameters[i][self.expert]).detach()

    @property
    def shape(self) -> tuple[int, int]:
        return (self.b.shape[0], self.a.flatten(1).shape[1])


LARGEST = 2**24
"""Entries of the largest matrix that is sampled: a spectrum of more would take seconds."""


def matrices(model: nn.Module, found: list[Block]) -> list[Matrix | LowRank]:
    """A sample of the trained matrices: of each kind, such as "query of a block", the first, the middle and the last.

    Linear layers, embeddings, routers, and of expert banks expert 0; fused weights (query, key and value; gate and up)
    are split. Of an adapted layer (PEFT's LoRA, `LowRankExperts`) the product of its two factors, for every expert.
    """
    kinds: dict[str, list[Matrix | LowRank]] = {}
    for matrix in _all_matrices(model, found):
        if matrix.shape[0] * matrix.shape[1] <= LARGEST and min(matrix.shape) > 1:
            expert = getattr(matrix, "expert", None)  # each expert is a kind of its own
            kinds.setdefault(f"{re.sub(r'[0-9]+', '*', matrix.name)} {expert}", []).append(matrix)
    chosen = {id(kind[i]) for kind in kinds.values() for i in (0, len(kind) // 2, -1)}
    return [matrix for kind in kinds.values() for matrix in kind if id(matrix) in chosen]


def _all_matrices(model: nn.Module, found: list[Block]) -> Iterator[Matrix | LowRank]:
    routers = {id(block.module.get_submodule(block.router)) for block in found}
    for name, module in model.named_modules():
        if ".lora_" in f".{name}":
            continue  # the factors, seen as a pair
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield from _adapters(name, module)
        if isinstance(module, LowRankExperts):
            yield from _experts(name, module)
            continue
        other_expert = re.search(r"experts\.(\d+)\.", f"{name}.")
        if other_expert and int(other_expert.group(1)):
            continue
        table = isinstance(module, nn.Linear | nn.Embedding) or id(module) in routers
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and (parameter.ndim == 3 or (parameter.ndim == 2 and table)):
                path = f"{name}.{key}".strip(".").removesuffix(".weight")
                yield from _split(path, key, module, parameter)


def _split(path: str, key: str, module: nn.Module, parameter: nn.Parameter) -> Iterator[Matrix]:
    """The matrices of one parameter: one of several experts, and what is fused in it."""
    packed = parameter.ndim == 3
    head, _, last = path.rpartition(".")
    names = (last,)
    if last == "qkv" and parameter.shape[0] % 3 == 0:
        names = ("q", "k", "v")
    elif key.startswith("gate_up") and packed:
        down = getattr(module, key.replace("gate_up", "down"), None)
        # (E, 2 H, D) beside (E, D, H); other layouts are left whole
        if isinstance(down, Tensor) and parameter.shape[1:] == (2 * down.shape[2], down.shape[1]):
            names = ("gate", "up")
    elif last == "gate_up" and parameter.shape[0] % 2 == 0:
        names = ("gate", "up")
    for i, name in enumerate(names):

        def pick(tensor: Tensor, i: int = i) -> Tensor:
            return (tensor[0] if packed else tensor).chunk(len(names))[i]

        yield Matrix(".".join(filter(None, (head, "0" if packed else "", name))), parameter, pick)


def _adapters(name: str, module: nn.Module) -> Iterator[LowRank]:
    for adapter, a in module.lora_A.items():
        b = module.lora_B[adapter]
        if a.weight.requires_grad and b.weight.requires_grad:
            label = f"{name}.lora" if len(module.lora_A) == 1 else f"{name}.lora.{adapter}"
            yield LowRank(label.lstrip("."), (a.weight, b.weight), float(module.scaling[adapter]))


def _experts(name: str, bank: LowRankExperts) -> Iterator[LowRank]:
    if bank.a.requires_grad and bank.b.requires_grad:
        for expert, scale in enumerate(bank.scale.tolist()):
            yield LowRank(f"{name}.{expert}".lstrip("."), (bank.a, bank.b), scale, expert)


class Inputs:
    """Token ids and padding of the batch now in a model that is called with `input_ids` and `attention_mask`."""

    def __init__(self, model: nn.Module):
        self.ids: Tensor | None = None
        self.real: Tensor | None = None
        self.remove = model.register_forward_pre_hook(self._before, with_kwargs=True).remove

    def _before(self, module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
        ids, mask = keywords.get("input_ids"), keywords.get("attention_mask")
        self.ids = ids.flatten() if isinstance(ids, Tensor) else None
        self.real = mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def without_padding(self, routing: Routing, context: Context) -> tuple[Routing, Context]:
        """The routing of the tokens that are no padding, and their ids, where the batch is known to be these tokens."""
        ids = self.ids if self.ids is not None and self.ids.numel() == routing.n_tokens else context.token_ids
        if self.real is None or self.real.numel() != routing.n_tokens or routing.top_k is None:
            return routing, Context(token_ids=ids, domain=context.domain)
        keep = self.real.to(routing.expert.device)
        probs = None if routing.probs is None else routing.probs[keep]
        real = Routing.fixed(routing.indices[keep], routing.weights[keep], routing.n_experts, probs=probs)
        return real, Context(token_ids=None if ids is None else ids[keep])


def in_backward() -> bool:
    """Whether autograd is running now: a forward then is the recomputation of a checkpointed one, seen before."""
    return torch._C._current_graph_task_id() != -1
