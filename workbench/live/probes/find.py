"""Where to look in a model, whoever wrote it: its matrices and its parameter groups, and its batch as it is called.

Its mixture-of-experts blocks are found by `blocks`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from workbench.lib.core.low_rank import LowRankExperts, MadeFactors
from workbench.lib.core.observe import Changing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.gradients import Member, size
from workbench.live.probes.blocks import Block, blocks, modules, plain, pools, unread

__all__ = ["Block", "Inputs", "LowRank", "Matrix", "blocks", "groups", "matrices", "pools", "size", "unread"]

MOST_EXPERTS = 16
"""Experts of a bank of low-rank experts up to which each of them is a group of parameters of its own."""


def groups(model: nn.Module, found: list[Block]) -> dict[str, list[Member]]:
    """The trained parameters in groups by their part in the model, each parameter, or slice of one, in one.

    Of a mixture-of-experts block "router", "experts" and "shared" (what every token passes), and of low-rank experts
    each one, "experts.0" and so on; of a numbered layer around a block "attention" (the rest, norms included); a block
    without a router and a numbered layer without a block as a whole; everything else is the "trunk" (embeddings, last
    norm, head). What is frozen counts where its layer's form changes while it trains: it may be its turn later.
    """
    later = {p for module in model.modules() if isinstance(module, Changing) for p in module.parameters()}
    banks = [module for module in model.modules() if isinstance(module, LowRankExperts)]
    of_bank = {p: len(p) for bank in banks for p in bank.parameters() if len(p) == bank.n_experts <= MOST_EXPERTS}
    result: dict[str, list[Member]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter in later:
            group = _group(plain(name), found)
            if parameter in of_bank and group.rpartition(".")[2] == "experts":
                for expert in range(of_bank[parameter]):
                    result.setdefault(f"{group}.{expert}", []).append((parameter, expert))
            else:
                result.setdefault(group, []).append(parameter)
    return result


def _group(name: str, found: list[Block]) -> str:
    for block in found:
        inside = name.removeprefix(f"{block.path}." if block.path else "")
        if inside != name or not block.path:
            if not block.router:
                return block.path or "trunk"
            parts = {block.router: "router", "experts": "experts"}
            part = next((what for prefix, what in parts.items() if inside.startswith(f"{prefix}.")), "shared")
            return f"{block.path}.{part}".lstrip(".")
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    if numbered is None:
        return "trunk"
    layer = numbered.group()
    return (
        f"{layer}.attention" if any(block.router and block.path.startswith(f"{layer}.") for block in found) else layer
    )


@dataclass(frozen=True)
class Matrix:
    """One matrix (o, i) inside a trained parameter, for the parameter itself, its gradient or its change alike.

    Or one that is linear in the parameter, where that is no matrix: see `matrices`.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    pick: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.pick(self.parameter).shape)


@dataclass(frozen=True)
class LowRank:
    """A pair of factors, trained or made of what is trained, whose product scale * B A is what is watched (LoRA).

    Attributes:
        parameters: A and B, or what `made` makes them of.
        expert: which of several in the same two parameters; None where the parameters are this pair alone.
        packed: how many there are in two matrices as PEFT packs them, A in blocks and B interleaved; None where the
            parameters have an axis of experts.
        made: what makes the factors; None where they are the parameters.
    """

    name: str
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    scale: float
    expert: int | None = None
    packed: int | None = None
    made: Callable[[], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r) as they are now."""
        if self.made is not None:
            return self.made()
        a, b = (parameter.detach() for parameter in self.parameters)
        if self.packed:
            a, b = a.unflatten(0, (self.packed, -1))[self.expert], b.unflatten(1, (-1, self.packed))[..., self.expert]
        elif self.expert is not None:
            a, b = a[self.expert], b[self.expert]
        return a.flatten(1), b.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        if isinstance(self.made, MadeFactors):
            return self.made.shape
        a, b = self.factors()
        return (b.shape[0], a.shape[1])


LARGEST = 2**24
"""Entries of the largest matrix that is sampled: a spectrum of more would take seconds."""


def matrices(model: nn.Module, found: list[Block]) -> list[Matrix | LowRank]:
    """A sample of the trained matrices: of each kind, such as "query of a block", the first, the middle and the last.

    Linear layers, embeddings, routers, convolutions of one group (output channels by all that they see of a patch), and
    of expert banks expert 0; fused weights (query, key and value; gate and up) are split. Of an adapted layer (PEFT's
    LoRA, `LowRankExperts`, `MadeFactors`) the product of its two factors, for every expert; of PEFT's LoRA on more than
    16 packed experts for the first, the middle and the last of them. So of a layer of two factors, which gives them as
    `watched_factors()`, A (r, I) and B (O, r). A module whose matrices are linear in a parameter of another shape has
    `made_matrices()`: (name, parameter, what makes the matrix of it), for each.
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
    for name, module in modules(model).items():
        if ".lora_" in f".{name}":
            continue  # the factors, seen as a pair
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield from _adapters(name, module)
        if isinstance(module, LowRankExperts):
            yield from _experts(name, module)
            continue
        if isinstance(module, MadeFactors):
            parameters = tuple(p for p in module.parameters() if p.requires_grad)
            if parameters:
                yield LowRank(name, parameters, module.scale, made=module)
        if (factors := getattr(module, "watched_factors", None)) is not None:
            parameters = tuple(p for p in module.parameters(recurse=False) if p.requires_grad and p.ndim > 1)
            if parameters:
                yield LowRank(name, parameters, 1.0, made=factors)
        if (made := getattr(module, "made_matrices", None)) is not None:
            for key, parameter, pick in made():
                if parameter.requires_grad:
                    yield Matrix(f"{name}.{key}".strip(".").removesuffix(".weight"), parameter, pick)
        other_expert = re.search(r"experts\.(\d+)\.", f"{name}.")
        if other_expert and int(other_expert.group(1)):
            continue
        # a list is of parameters that belong to no layer, as the logits of a mask over the weights of a model
        table = isinstance(module, nn.Linear | nn.Embedding | nn.ParameterList) or id(module) in routers
        if isinstance(module, _ConvNd) and module.groups == 1 and module.weight.requires_grad:
            yield Matrix(name, module.weight, lambda kernel: kernel.flatten(1))
            continue
        rates = getattr(module, "undecayed", ())  # of a state space: a table by which nothing is multiplied
        for key, parameter in module.named_parameters(recurse=False):
            if (
                key not in rates
                and parameter.requires_grad
                and (parameter.ndim == 3 or (parameter.ndim == 2 and table))
            ):
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
            pair, scale = (a.weight, b.weight), float(module.scaling[adapter])
            parameter, count = getattr(module, "parameter_name", None), getattr(module, "num_experts", 1)
            if parameter is None or count == 1:
                yield LowRank(label.lstrip("."), pair, scale)
                continue
            # peft's target_parameters: one wrapper around another for each parameter of the experts
            label = label.replace(".base_layer", "").replace(".lora", f".{parameter}.lora").lstrip(".")
            for expert in range(count) if count <= MOST_EXPERTS else (0, count // 2, count - 1):
                yield LowRank(f"{label}.{expert}", pair, scale, expert, count)


def _experts(name: str, bank: LowRankExperts) -> Iterator[LowRank]:
    if bank.a.requires_grad and bank.b.requires_grad:
        for expert, scale in enumerate(bank.scale.tolist()):
            yield LowRank(f"{name}.{expert}".lstrip("."), (bank.a, bank.b), scale, expert)


class Inputs:
    """Token ids and padding of the batch now in a model that is called with `input_ids` and `attention_mask`.

    An encoder-decoder model has them for each side, the decoder's as `decoder_input_ids` and `decoder_attention_mask`.
    """

    def __init__(self, model: nn.Module):
        self.sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.model = getattr(model, "_orig_mod", model)
        self.remove = self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove

    def _before(self, module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
        if module is not self.model:
            return
        for side in ("", "decoder_"):
            ids, mask = keywords.get(f"{side}input_ids"), keywords.get(f"{side}attention_mask")
            self.sides[side] = (
                ids.flatten() if isinstance(ids, Tensor) else None,
                mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            )

    def without_padding(self, block: Block, routing: Routing, context: Context) -> tuple[Routing, Context]:
        """The routing of the tokens that are no padding, and what is known of them, where the batch is these tokens."""
        decoder = self.two_sided and "decoder" in block.path.split(".")
        ids, real = self.sides.get("decoder_" if decoder else "", (None, None))
        ids = ids if ids is not None and ids.numel() == routing.n_tokens else context.token_ids
        real = real if real is not None and real.numel() == routing.n_tokens else context.mask
        told = {"token_ids": ids, "domain": context.domain, "modality": context.modality}
        if real is None or real.numel() != routing.n_tokens or bool(real.all()):
            return routing, Context(**told)
        keep = real.to(routing.expert.device)
        kept = {name: None if part is None else part.to(keep.device)[keep] for name, part in told.items()}
        return _tokens_of(routing, keep), Context(**kept)


def _tokens_of(routing: Routing, keep: Tensor) -> Routing:
    """The routing of the tokens where `keep` (N,) holds."""
    pair = keep[routing.token]
    offsets = nn.functional.pad(routing.active_counts[keep].cumsum(0), (1, 0))
    probs, kept = routing.probs, routing.kept
    return Routing(
        routing.expert[pair],
        routing.weight[pair],
        offsets,
        routing.n_experts,
        routing.top_k,
        probs=None if probs is None else probs[keep],
        kept=None if kept is None else kept[pair],
    )
