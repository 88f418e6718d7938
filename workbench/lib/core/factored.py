"""Linear layers of factors in the place of dense ones, on any model: what low-rank methods put in and take out again.

    replaced = factorise(model, 16, targets="*.mlp.*")      # or a rank for each layer, by its name
    replaced.report()                                       # parameters and operations, before and after
    merge_back(model)                                       # dense again, the same function

Another kind of layer goes the same way, `replace_linears(model, make, targets)`, if it is a `FactoredLinear`.

Tensor letters: O output width, I input width, r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.adapt.adapted import replace_module
from workbench.lib.core.adapt.matrix import as_linear, is_linear, is_turned, weight_at
from workbench.lib.core.adapt.put import check_model, find_targets
from workbench.lib.core.adapt.reading import Unreadable
from workbench.lib.core.budget import count_params
from workbench.lib.core.low_rank import check_rank


class FactoredLinear(nn.Module):
    """A layer in the place of a linear one, with other parameters than the weight (O, I).

    Attributes:
        bias: (O,), or None.
        turned: whether the weight of the layer that was there lay as (I, O), as in GPT-2's `Conv1D`.

    Args:
        bias: whether there is one, zero at first; or the one to go on with.
    """

    turned = False

    def __init__(self, d_in: int, d_out: int, bias: bool | Tensor | None = True):
        super().__init__()
        if min(d_in, d_out) < 1:
            raise InputError(f"d_in, d_out are {d_in}, {d_out} but must both be at least 1")
        self.in_features, self.out_features = d_in, d_out
        if isinstance(bias, bool):
            bias = torch.zeros(d_out) if bias else None
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def merged(self) -> Float[Tensor, "d_out d_in"]:
        """The weight of the dense layer that is the same function; an `InputError` where there is none."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Of the update that the factors can be."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Floating-point operations of one token, forward."""
        return 2 * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    @property
    def weight(self) -> Tensor:
        """What a host sees that reads the weight of the layer that was there: the product, as that one lay.

        Where there is none it sees what kind of tensor it was, and may not compute with it.
        """
        try:
            return self.merged().T if self.turned else self.merged()
        except InputError as error:
            like = next(self.parameters())
            shape = (self.in_features, self.out_features) if self.turned else (self.out_features, self.in_features)
            return Unreadable(like.new_empty(()).expand(shape), f"the model computes with a weight, but {error}")

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The dense layer of the kind that was there."""
        weight = (self.merged().T if self.turned else self.merged()).contiguous()
        if self.turned:
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(1, 1)
            layer.nx, layer.nf = self.in_features, self.out_features
            layer.bias = nn.Parameter(weight.new_zeros(self.out_features)) if self.bias is None else self.bias
        else:
            layer = nn.Linear(1, 1, bias=False, device=weight.device, dtype=weight.dtype)
            layer.in_features, layer.out_features, layer.bias = self.in_features, self.out_features, self.bias
        layer.weight = nn.Parameter(weight)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LowRankLinear(FactoredLinear):
    """y = U (V x) + bias: a weight U V of rank r.

    Attributes:
        u: (O, r).
        v: (r, I). Both are such at first that y varies as that of a new `nn.Linear`.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool | Tensor | None = True):
        super().__init__(d_in, d_out, bias)
        check_rank(rank, d_in, d_out)
        self.v = nn.Parameter(torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.u = nn.Parameter(torch.empty(d_out, rank).uniform_(-((3 / rank) ** 0.5), (3 / rank) ** 0.5))

    @classmethod
    def from_dense(cls, weight: Float[Tensor, "d_out d_in"], rank: int, bias: Tensor | None = None) -> "LowRankLinear":
        """The layer of that rank nearest to a dense one: its truncated SVD, the root of S on either side.

        Raises:
            InputError: the rank is above the smaller width, or the weight is not finite.
        """
        check_rank(rank, weight.shape[1], weight.shape[0])
        return cls.of(*truncated(weight, rank), bias)

    @classmethod
    def of(
        cls, u: Float[Tensor, "d_out rank"], v: Float[Tensor, "rank d_in"], bias: Tensor | None = None
    ) -> "LowRankLinear":
        """The layer of these factors."""
        layer = cls.__new__(cls)
        FactoredLinear.__init__(layer, v.shape[1], u.shape[0], bias)
        layer.v, layer.u = nn.Parameter(v), nn.Parameter(u)
        return layer

    @property
    def rank(self) -> int:
        return self.v.shape[0]

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(F.linear(x, self.v), self.u, self.bias)

    def merged(self) -> Float[Tensor, "d_out d_in"]:
        return self.u @ self.v

    def watched_factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """V and U, whose product the live views watch."""
        return self.v.detach(), self.u.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


@torch.no_grad()
def truncated(
    weight: Float[Tensor, "d_out d_in"], rank: int
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """The first singular triplets of a weight as two factors, the root of S on either side, in the weight's type."""
    if not weight.isfinite().all():
        raise InputError(f"the weight {tuple(weight.shape)} is not finite, so it has no factors")
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


@dataclass(frozen=True)
class Replaced:
    """What was put where.

    Attributes:
        model: changed in place.
        layers: what was put in, by name.
        left_out: what the targets match and stays as it is, with the reason.
        params_before: of the model.
        before: of each layer that is gone its parameters and its operations a token.
    """

    model: nn.Module
    layers: Mapping[str, FactoredLinear]
    left_out: Mapping[str, str]
    params_before: int
    before: Mapping[str, tuple[int, int]]

    def report(self) -> dict[str, Any]:
        """Parameters of the model and operations a token of the replaced layers, before and after, and each layer."""
        rows = {
            name: {
                "rank": layer.rank,
                "params_before": params,
                "params": count_params(layer),
                "flops_before": flops,
                "flops": layer.flops,
            }
            for (name, layer), (params, flops) in zip(self.layers.items(), self.before.values(), strict=True)
        }
        return {
            "params_before": self.params_before,
            "params": count_params(self.model),
            "flops_before": sum(row["flops_before"] for row in rows.values()),
            "flops": sum(row["flops"] for row in rows.values()),
            "layers": rows,
            "left_out": dict(self.left_out),
        }


def find_linears(model: nn.Module, targets: str | Sequence[str] = "*") -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers whose names match, each seen as an `nn.Linear`, and what matches and cannot be replaced.

    Left out are packed experts; layers whose weight is used elsewhere too, as an output's that is tied to the
    embedding: replaced, the weight would be there still; and those whose weight is computed, as under a weight norm.

    Raises:
        InputError: a target matches no linear layer, or nothing that can be replaced; or the model is wrapped, compiled
            or adapted.
    """
    check_model(model)
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    found, left_out = find_targets(model, patterns)
    users, linears = weight_users(model), {}
    for name, module in found.items():
        if not is_linear(module):
            left_out[name] = "packed with other experts in one tensor"
            continue
        linear = as_linear(module)
        try:
            holder, key = weight_at(linear)
        except InputError:
            left_out[name] = "its weight is computed from others"
            continue
        others = [user for user in users[holder._parameters[key]] if user != f"{name}.{key}"]
        if others:
            left_out[name] = f"its weight is {others[0]} too"
        else:
            linears[name] = linear
    if not linears:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise InputError(f"targets {targets!r} match nothing that can be replaced: {reasons or 'there are none'}")
    return linears, left_out


def weight_users(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all its names, but one only for a module that is in several places."""
    users: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                users.setdefault(p, []).append(f"{name}.{key}".lstrip("."))
    return users


def replace_linears(
    model: nn.Module,
    make: Callable[[nn.Linear, str], FactoredLinear | None],
    targets: str | Sequence[str] = "*",
) -> Replaced:
    """Put `make(layer, name)` in the place of each linear layer whose name matches; None leaves it.

    Layers are those that `workbench.adapt` names, GPT-2's `Conv1D` among them. All are made before the first is put in,
    so that the model is as it was where one cannot be made. A new layer goes on in the mode of the old one; frozen,
    where that was.

    Raises:
        InputError: as `find_linears`, or of `make`.
    """
    linears, left_out = find_linears(model, targets)
    made = {}
    for name, linear in linears.items():
        if (layer := make(linear, name)) is not None:
            made[name] = layer
    params, before = count_params(model), {}
    for name, layer in made.items():
        linear, there = linears[name], model.get_submodule(name)
        before[name] = count_params(there), 2 * linear.weight.numel()
        layer.turned = is_turned(linear)
        for p in layer.parameters():
            if p is not linear.bias:
                p.requires_grad_(p.requires_grad and linear.weight.requires_grad)
        layer.train(there.training)
        replace_module(model, there, layer)
    return Replaced(model, made, left_out, params, before)


def factorise(model: nn.Module, ranks: int | Mapping[str, int], targets: str | Sequence[str] = "*") -> Replaced:
    """Put the nearest layer of low rank in the place of each linear layer whose name matches.

    Args:
        ranks: one for all; or one for each layer by its name: the others stay dense.

    Raises:
        InputError: as `find_linears`; a rank above a layer's smaller width; a name in `ranks` that no layer has.
    """

    def make(layer: nn.Linear, name: str) -> LowRankLinear | None:
        rank = ranks.get(name) if isinstance(ranks, Mapping) else ranks
        if rank is None:
            return None
        try:
            return LowRankLinear.from_dense(layer.weight, rank, layer.bias)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    if isinstance(ranks, Mapping):
        linears, _ = find_linears(model, targets)
        if missing := [name for name in ranks if name not in linears]:
            raise InputError(f"ranks has {missing[0]!r}, which is no linear layer that can be replaced here")
    return replace_linears(model, make, targets)


def merge_back(model: nn.Module) -> nn.Module:
    """Put dense layers in the place of all factored ones: the same function, as far as rounding goes.

    Raises:
        InputError: one of them is no linear map. The model is as it was then.
    """
    dense = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FactoredLinear):
            try:
                dense[layer] = layer.dense()
            except InputError as error:
                raise InputError(f"{name} cannot be merged back: {error}") from None
    for layer, made in dense.items():
        replace_module(model, layer, made)
    return model
