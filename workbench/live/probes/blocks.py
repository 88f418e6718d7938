"""The mixture-of-experts blocks of a model, whoever wrote it, and how their decisions are seen.

Blocks are recognised by what they are, not by a list of models:

- `Announcing`, such as `MoELayer` or an attention that chooses blocks of keys;
- a block with experts that are called with the decision of its router, (x, indices, weights) in any order, as in
  transformers 5: what they are given is what is counted;
- a block with experts and a router beside them, and a router by itself, whose output tells the decision (`decisions`).
  Where it is a plain linear layer, as in transformers 4, an integer K has to stand in the block.

What is not recognised is named by `unread`, and read where `routers` says how.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing
from workbench.live.probes import decisions

Observer = Callable[["Block", Routing | str, Context], None]
Reader = Callable[[nn.Module, tuple, Any], Routing]
GATES = ("gate", "router", "gating")
COUNTS = (
    *("total_experts", "num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"),
    "moe_num_experts",
)  # the first counts what computes nothing as well
CHOICES = (
    *(
        "top_k",
        "topk",
        "k",
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "num_selected_experts",
    ),
    *("moe_top_k", "moe_topk", "moe_k", "top_k_experts"),
)
COMPILED = (
    "workbench.watch reads routers between compiled graphs: compile without fullgraph=True, or what holds no router"
)


@dataclass(frozen=True)
class Block:
    """One mixture-of-experts block of a model.

    Attributes:
        name: of the block in the model; of one depth of a module that a model applies at several, "name@depth".
        router: name of its router inside the block; "" for a block that decides by itself, or whose router is unknown.
        n_experts, top_k: E, and K or None where it varies or is not known.
        experts: the experts that are called with the decision, where they are.
        reader: what reads the decision, where `routers` said so.
        members: the experts one by one, where each is a module.
        depth: at which a module is applied that is applied at several; None where there is one.
    """

    name: str
    module: nn.Module = field(repr=False)
    router: str
    n_experts: int
    top_k: int | None
    experts: nn.Module | None = field(repr=False, default=None)
    reader: Reader | None = field(repr=False, default=None)
    members: tuple[nn.Module, ...] = field(repr=False, default=())
    depth: int | None = None

    @property
    def path(self) -> str:
        """The name of the module in the model."""
        return self.name if self.depth is None else self.name.removesuffix(f"@{self.depth}")

    def observe(self, observer: Observer, wanted: Callable[["Block"], bool]) -> Callable[[], None]:
        """Call `observer(block, routing, context)` after each `wanted` decision, until the returned function is called.

        A decision that cannot be read comes as words that say what was there instead.
        """
        if isinstance(self.module, Announcing):

            def seen(module: Announcing, routing: Routing, context: Context) -> None:
                if module is not self.module or not wanted(self):
                    return
                if self.depth is None:
                    observer(self, routing, context)
                    return
                depths, number = module.depths, context.passed[module]
                if number > len(depths):
                    observer(self, f"its pass number {number} in one forward: it has the depths {depths}", context)
                elif depths[number - 1] == self.depth:
                    observer(self, routing, context)

            return self.module.observe(seen).remove
        parts = self.parts  # a copy of the model has a copy of these hooks
        scores: list[Tensor] = []  # of the router's last call

        def decided(module: nn.Module, inputs: tuple, keywords: dict[str, Any], output: Any) -> None:
            if module is not parts[0] or not wanted(self):
                return
            if self.reader is not None:
                observer(self, self._told(self.reader(module, inputs, output)), Context())
                return
            returned = list(decisions.tensors(output))
            if self.experts is None:
                observer(self, self._read(returned, _called(inputs, keywords)[1]), Context())
            else:
                flat = [part.flatten(0, -2) for part in returned if part.ndim > 1 and part.is_floating_point()]
                scores[:] = [part for part in flat if part.shape[1] == self.n_experts]

        def given(module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
            if module is self.experts and wanted(self):
                others, n_tokens = _called(inputs, keywords)
                observer(self, self._read(others, n_tokens, [s for s in scores if len(s) == n_tokens]), Context())
                scores.clear()

        removes = []
        if self.router:
            hook = torch.compiler.disable(decided, reason=COMPILED)
            removes.append(parts[0].register_forward_hook(hook, with_kwargs=True).remove)
        if self.experts is not None:
            hook = torch.compiler.disable(given, reason=COMPILED)
            removes.append(self.experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return lambda: [remove() for remove in removes]

    @property
    def recursive(self) -> bool:
        """Whether its experts are recursions, so that a token has a depth."""
        return isinstance(self.module, Announcing) and self.module.recursive

    @property
    def parts(self) -> list[nn.Module]:
        """What is looked at: the router and the experts, or the block that announces its decisions."""
        if isinstance(self.module, Announcing):
            return [self.module]
        router = [self.module.get_submodule(self.router)] if self.router else []
        return router + ([] if self.experts is None else [self.experts])

    def _told(self, found: Any) -> Routing:
        if not isinstance(found, Routing) or found.n_experts != self.n_experts:
            what = f"a Routing of {found.n_experts}" if isinstance(found, Routing) else f"a {type(found).__name__}"
            where = _name(self.name, self.router)
            raise InputError(f"what reads {where} gave {what} but must give a Routing of {self.n_experts} experts")
        return found

    def _read(self, parts: list[Tensor], n_tokens: int, scores: list[Tensor] = ()) -> Routing | str:
        found = decisions.read(parts, n_tokens, self.n_experts, self.top_k, scores)
        return decisions.described(parts) if found is None else found


def _called(inputs: tuple, keywords: dict[str, Any]) -> tuple[list[Tensor], int]:
    """What a module is called with beside hidden states, the first floating-point tensor, and the number of those."""
    parts = list(decisions.tensors([inputs, keywords]))
    first = next((i for i, part in enumerate(parts) if part.is_floating_point() and part.numel()), None)
    if first is None:
        return parts, 0
    hidden = parts.pop(first)
    return parts, hidden.numel() // hidden.shape[-1]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; one that was compiled stands under the name that it had before."""
    return {plain(name): module for name, module in model.named_modules()}


def plain(name: str) -> str:
    """The name of a module or parameter without what compiling a part has put into it."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).lstrip(".")


def blocks(model: nn.Module, routers: Mapping[str, tuple[int, Reader]] | None = None) -> list[Block]:
    """The mixture-of-experts blocks of a model, in its order.

    Args:
        routers: for names of modules, or patterns of them, E and what reads the decision, see `workbench.watch`.
    """
    known = modules(model)
    told = _told(known, routers or {})
    found: dict[str, Block] = {}  # by the name of the router, or of the experts
    for name, module in known.items():
        parent = name.rpartition(".")[0]
        if isinstance(module, Announcing):
            router = "router" if isinstance(getattr(module, "router", None), nn.Module) else ""
            for depth in module.depths or (None,):
                own = name if depth is None else f"{name}@{depth}"
                found[own] = Block(own, module, router, module.n_experts, module.top_k, depth=depth)
        elif name in told:
            n_experts, reader = told[name]
            block = Block(parent, known[parent], name.removeprefix(f"{parent}."), n_experts, None, reader=reader)
            found[name] = block
        elif not any(_within(other, name) for other in told) and (block := _of_experts(name, module)) is not None:
            found[_name(name, block.router)] = block
        elif _is_router(module) and name not in found and not any(_within(other, parent) for other in told):
            router = name.removeprefix(f"{parent}.") if parent else name
            n_experts, top_k = _integer(COUNTS, module), _integer(CHOICES, module)
            found[name] = Block(parent, known[parent], router, n_experts, top_k)
    return _in_order_of_depth(list(found.values()))


def _in_order_of_depth(found: list[Block]) -> list[Block]:
    """Those of several depths in the order in which tokens pass them, in the places that they have."""
    ordered = iter(sorted((block for block in found if block.depth is not None), key=lambda block: block.depth))
    return [block if block.depth is None else next(ordered) for block in found]


def pools(found: list[Block]) -> dict[str, list[Block]]:
    """The blocks that use the same experts, where there are several, by the name of the experts."""
    held: dict[nn.Module, list[Block]] = {}
    for block in found:
        experts = getattr(block.module, "experts", None)
        if isinstance(block.module, Announcing) and isinstance(experts, nn.Module):
            held.setdefault(experts, []).append(block)
    return {_name(users[0].path, "experts"): users for users in held.values() if len(users) > 1}


def unread(model: nn.Module, found: list[Block]) -> list[str]:
    """Names of modules that look like mixtures of experts and are none of those found, nor in or around one."""
    names: list[str] = []
    for name, module in modules(model).items():
        mixed = re.search(r"(MoE|Moe)(Block|Layer)?$|SparseMLP$", type(module).__name__)
        banks = [child for each, child in module.named_children() if _is_bank(each)]
        if not mixed and not any((_integer(COUNTS, bank) or _length(bank)) != 1 for bank in banks):
            continue
        ours = any(_within(name, block.path) or _within(block.path, name) for block in found)
        if not ours and not isinstance(module, Announcing) and not any(_within(name, outer) for outer in names):
            names.append(name)
    return names


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.") or not outer


def _name(block: str, inside: str) -> str:
    return ".".join(filter(None, (block, inside)))


def _told(known: dict[str, nn.Module], routers: Mapping[str, tuple[int, Reader]]) -> dict[str, tuple[int, Reader]]:
    found = {}
    for pattern, how in routers.items():
        if not (isinstance(how, tuple) and len(how) == 2 and _is_int(how[0]) and how[0] > 0 and callable(how[1])):
            raise InputError(
                f"routers[{pattern!r}] is {how!r} but must be a pair: the number of experts, and a function of "
                "(module, inputs, output) that gives a Routing"
            )
        names = [name for name in known if name and fnmatch(name, pattern)]
        if not names:
            raise unknown("module in routers", pattern, list(known))
        found |= dict.fromkeys(names, how)
    return found


def _of_experts(name: str, module: nn.Module) -> Block | None:
    """The block that a module is because of the experts in it; one that announces itself has been seen."""
    if isinstance(module, Announcing):
        return None
    children = dict(module.named_children())
    bank = next((child for child in children if _is_bank(child)), None)
    if bank is None:
        return None
    experts = children[bank]
    while isinstance(inner := getattr(experts, "base_layer", None), nn.Module):  # wrapped by peft
        experts = inner
    named = [child for child in GATES if child in children]
    router = next(iter(named or [child for child in children if _says_router(children[child])]), "")
    gate = children.get(router)
    plain_gate = isinstance(getattr(gate, "base_layer", gate), nn.Linear) and not _is_router(gate)
    near = [part for part in (gate, experts, module) if part is not None]
    told = max((_integer(COUNTS, part) or 0 for part in near), default=0)
    n_experts = gate.out_features if plain_gate else told or _length(experts)
    top_k = next((k for part in near if (k := _integer(CHOICES, part, configured=True))), None)
    takes = _takes_decision(experts)
    if n_experts < 2 or not (takes or (gate is not None and not (plain_gate and top_k is None))):
        return None
    listed = list(experts.children()) if isinstance(experts, nn.ModuleList | nn.ModuleDict) else []
    alike = tuple(child for child in listed if type(child) is type(listed[0]))  # dropout may stand beside them
    members = alike if len(alike) == n_experts else ()
    return Block(name, module, router, n_experts, top_k, experts if takes else None, members=members)


def _is_bank(child: str) -> bool:
    return child.endswith("experts") and "shared" not in child


def _takes_decision(experts: nn.Module) -> bool:
    """Whether experts are called with the decision: hidden states, which of them, and how much of each."""
    if isinstance(experts, Announcing | nn.ModuleList | nn.Sequential):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = {name: p for name, p in inspect.signature(experts.forward).parameters.items() if p.kind in kinds}
    if any(p.annotation in (Routing, "Routing") for p in takes.values()):  # ours: the layer around it announces
        return False
    said = any(re.search(r"ind(ex|ices)|expert|mask|rout|top_?k|assign", name) for name in list(takes)[1:])
    return said and len(takes) >= 3


def _length(experts: nn.Module) -> int:
    """The number of experts that there are."""
    packed = [len(p) for p in experts.parameters(recurse=False) if p.ndim == 3]
    return packed[0] if packed else len(experts) if isinstance(experts, nn.ModuleList | nn.ModuleDict) else 0


def _says_router(module: nn.Module) -> bool:
    return re.search(r"(router|gate|gating)$", type(module).__name__.lower()) is not None


def _is_router(module: nn.Module) -> bool:
    """A module of its own that routes: its class says so, it knows E and K, and it has no experts itself."""
    named = re.search(r"router|gat(e|ing)", type(module).__name__.lower())
    counted = _is_int(getattr(module, "num_experts", None)) and _integer(CHOICES, module) is not None
    return bool(named) and counted and not hasattr(module, "experts") and not isinstance(module, Announcing)


def _integer(names: tuple[str, ...], module: nn.Module, configured: bool = False) -> int | None:
    """The first of the attributes that is a positive whole number, of the module or, if asked, its configuration."""
    for holder in (module, getattr(module, "config", None) if configured else None):
        for name in names:
            value = getattr(holder, name, None)
            if _is_int(value) and value > 0:
                return value
    return None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
