"""Experts that are whole feed-forward blocks: one frozen block, and low-rank updates of every linear layer in it.

The non-linearity is inside an expert, so a mixture of them is another function than a mixture of updates in each linear
layer, except with one expert a token.

Tensor letters: N tokens, D model width, E experts, K experts of a token, P routed pairs, B groups of tokens.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.adapt.adapted import Adapted
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.adapt.layer import RoutedLayer, plain
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.recompute import Call, Repeat
from workbench.lib.core.routing import Context, Routing


class RoutedFeedForward(RoutedLayer):
    """y_n = sum_e w[n, e] FFN_e(x_n), FFN_e the frozen block with W + s_e B_e A_e in place of each of its matrices W.

    The frozen block is inside every expert: nothing is added to the sum, and where the weights of a token sum to less
    than 1, less than a whole block remains. One decision serves all linear layers of the block. The frozen input layers
    run once a token, since every expert begins with them; so does the output layer, since it is linear and can be given
    the weighted sum of what the experts would give it. With a gate that is 3 D H products a token instead of 3 K D H.

    Attributes:
        block: the frozen block; its module is `base`.
        router: sees the block's input.
        experts: a bank for each linear layer of the block, by its name there. A layer that holds gate and up is one.

    Args:
        dropout: of what the updates are given, drawn for each of them.
    """

    def __init__(
        self, block: FeedForward, router: nn.Module, experts: Mapping[str, LowRankExperts], dropout: float = 0.0
    ):
        super().__init__(block.module)
        if experts.keys() != block.linears.keys():
            raise InputError(f"experts are for {', '.join(experts)} but must be for {', '.join(block.linears)}")
        for name, bank in experts.items():
            here, layer = (bank.n_experts, bank.d_in, bank.d_out), block.linears[name]
            if here != (router.n_experts, layer.in_features, layer.out_features):
                raise InputError(
                    f"experts[{name!r}] has (experts, inputs, outputs) {here} but must have "
                    f"{(router.n_experts, layer.in_features, layer.out_features)}"
                )
        self.block, self.router = block, router
        self.experts, self.dropout = nn.ModuleDict(experts), nn.Dropout(dropout)

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int | None:
        return self.router.top_k

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch d_out"]:
        """The block is called as it was before; what routers are told comes from `side`."""
        call, tokens = self.begin(x), plain(x).reshape(-1, x.shape[-1])
        routing = self.router(tokens, call.context)
        if self.balance is not None:
            self.balance.add(call, x, routing, self.router.coefficients.get("lbl", 0.0), self.side.mask(x))
        self.tell(call, routing, self.router.coefficients if self.balance is None else {})
        return call.carry(self.mix(tokens, routing).view(*x.shape[:-1], -1))

    def mix(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens d_out"]:
        """The experts' outputs, weighted and summed."""
        routing = routing.served()
        token = None if routing.top_k == 1 else routing.token
        pairs = Routing.fixed(routing.expert[:, None], torch.ones_like(routing.weight)[:, None], routing.n_experts)
        inputs = dict.fromkeys(name for name in (self.block.gate, self.block.up) if name)
        x_pairs = _rows(x, token)
        hidden = {
            name: self.updated(name, _rows(self.block.linears[name](x), token), x_pairs, pairs) for name in inputs
        }
        return self.output(activated(self.block, hidden), pairs, routing)

    def updated(
        self, name: str, frozen: Float[Tensor, "pairs d_out"], x: Float[Tensor, "pairs d_in"], pairs: Routing
    ) -> Float[Tensor, "pairs d_out"]:
        """One linear layer of the experts.

        Args:
            frozen: what the frozen layer gives.
            pairs: the expert of each row, with weight 1.
        """
        return frozen + self.experts[name](self.dropout(x), pairs)

    def output(
        self, hidden: Float[Tensor, "pairs hidden"], pairs: Routing, routing: Routing
    ) -> Float[Tensor, "tokens d_out"]:
        """The output layer of the experts, and the sum over the experts of each token."""
        down = self.block.linears[self.block.down]
        y = F.linear(combine(hidden, routing), down.weight)
        if down.bias is not None:
            y = y + combine(down.bias.to(y.dtype).expand(len(hidden), -1), routing)
        return y + combine(self.experts[self.block.down](self.dropout(hidden), pairs), routing)


def expert_loras(adapted: Adapted, expert: int) -> dict[str, LowRankExperts]:
    """One expert of every block as the LoRAs it is, by the names of the linear layers, and the LoRAs beside the blocks.

    They are what `adapt.peft.write_peft` takes: the folder is the model in which that expert serves every token.

    Raises:
        InputError: no such expert, or it is something else than plain LoRAs.
    """
    found: dict[str, LowRankExperts] = {}
    for name, layer in adapted.layers.items():
        routed = isinstance(layer, RoutedFeedForward)
        banks = {layer.block.names[key]: b for key, b in layer.experts.items()} if routed else {name: layer.experts}
        for key, bank in banks.items():
            if type(bank) is not LowRankExperts:
                raise InputError(f"{key} has {type(bank).__name__}, which are no plain LoRAs")
            if routed and not 0 <= expert < bank.n_experts:
                raise InputError(f"expert is {expert} but {name} has {bank.n_experts} of them, numbered from 0")
            e = expert if routed else 0
            found[key] = LowRankExperts.from_loras([(bank.a[e], bank.b[e], float(bank.scale[e]))])
            found[key].turned = bank.turned
    return found


@torch.no_grad()
def set_expert(adapted: Adapted, expert: int, loras: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Let an expert of the blocks be LoRAs that were trained elsewhere, such as those of `adapt.peft.read_loras`.

    Args:
        loras: (A (r, I), B (O, r), scale) by the names of linear layers in blocks; a lower rank than the experts' is
            padded with zeros. A layer of a block that is not named keeps what it has.

    Raises:
        InputError: a name, a width, a rank or the number does not fit; all of it in one message. Nothing is changed.
    """
    layers = [(name, layer) for name, layer in adapted.layers.items() if isinstance(layer, RoutedFeedForward)]
    banks = {layer.block.names[key]: bank for _, layer in layers for key, bank in layer.experts.items()}
    wrong = [f"no block has a linear layer {name!r}" for name in loras if name not in banks]
    for name in loras.keys() & banks.keys():
        (a, b, _), bank = loras[name], banks[name]
        if not 0 <= expert < bank.n_experts:
            wrong.append(f"expert is {expert} but {name} has {bank.n_experts} of them, numbered from 0")
        if (a.shape[1], b.shape[0]) != (bank.d_in, bank.d_out) or a.shape[0] != b.shape[1] or a.shape[0] > bank.rank:
            wrong.append(
                f"{name} has A {tuple(a.shape)} and B {tuple(b.shape)} but must have ({bank.rank} or fewer, "
                f"{bank.d_in}) and ({bank.d_out}, the same)"
            )
    if wrong:
        raise InputError(f"loras do not fit this model: {'; '.join(sorted(wrong))}")
    for name, (a, b, scale) in loras.items():
        bank = banks[name]
        bank.a[expert], bank.b[expert], bank.scale[expert] = 0.0, 0.0, scale
        bank.a[expert, : a.shape[0]], bank.b[expert, :, : b.shape[1]] = a, b


def activated(block: FeedForward, hidden: Mapping[str, Tensor]) -> Tensor:
    """What the output layer of a block is given, from what its input layers give, by their names."""
    gate, up = hidden[block.up].chunk(2, dim=-1) if block.fused else (hidden.get(block.gate), hidden[block.up])
    return block.activate(gate, up)


def combine(values: Float[Tensor, "pairs dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
    """The weighted sum over the pairs of each token."""
    values = values * routing.weight.to(values.dtype)[:, None]
    if routing.top_k is not None:
        return values.view(routing.n_tokens, routing.top_k, -1).sum(1)
    return values.new_zeros(routing.n_tokens, values.shape[1]).index_add(0, routing.token, values)


class JointBalance:
    """A balance loss over the routers of all layers together: one layer may lean where another leans the other way.

    Each layer reports its load and its probabilities, and the loss is made of them when the forward pass is over.
    Tokens that the model's `attention_mask` leaves out do not count in layers that are given all B T tokens.

    Args:
        value: (load (B, E), probability (B, E)) -> (B,), the loss of each group of tokens from its means over tokens
            and layers. The load is the number of times an expert is chosen, so that it sums to K.
        chosen: the choices (N, E) that the load is counted from. Where every expert serves every token those of the
            routing say nothing.
        by_sample: whether each row of the batch is a group, or the batch is one. A layer that is given (N, D) has no
            rows: its batch is one group.
    """

    def __init__(
        self,
        value: Callable[[Tensor, Tensor], Tensor],
        chosen: Callable[[Routing], Tensor] = Routing.mask,
        by_sample: bool = False,
    ):
        self.value, self.chosen, self.by_sample = value, chosen, by_sample

    def tie(self, adapted: Adapted) -> None:
        """Have all whole-block layers of an adapted model report here."""
        for layer in adapted.layers.values():
            if isinstance(layer, RoutedFeedForward):
                layer.balance = self

    def add(
        self,
        call: Call | Repeat,
        x: Float[Tensor, "*batch dim"],
        routing: Routing,
        coefficient: float,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> None:
        """Report one layer's routing of the tokens x in its call.

        Args:
            mask: False for tokens that do not count. In a call that is repeated it is that of the call before.
        """
        n, e, keep = routing.n_tokens, routing.n_experts, call.context.mask
        batch = x.shape[0] if x.ndim > 2 else 1 if mask is None else mask.shape[0]
        groups = len(call.own["counted"][0]) if call.repeated else batch if self.by_sample else 1
        kept = torch.ones(n, device=x.device) if keep is None else keep
        kept = kept.to(routing.probs.dtype).view(groups, -1, 1)
        load = (self.chosen(routing).view(groups, -1, e) * kept).sum(1)
        call.parts["probability"] = (routing.probs.view(groups, -1, e) * kept).sum(1)
        if not call.repeated:
            call.own["counted"] = load, kept.sum(1), coefficient

    def losses(self, calls: Sequence[Call]) -> dict[tuple[Hashable, str], Tensor]:
        """The loss of the layers that have the same groups, for each such number of groups."""
        sums: dict[int, tuple[Tensor | float, ...]] = {}
        weight: dict[int, float] = {}
        for call in calls:
            load, count, coefficient = call.own["counted"]
            before, groups = sums.get(len(load), (0.0, 0.0, 0.0)), len(load)
            parts = (load, call.part("probability"), count)
            sums[groups] = tuple(a + b for a, b in zip(before, parts, strict=True))
            weight[groups] = coefficient
        found = {}
        for groups, (load, probability, count) in sums.items():
            per_group = self.value(load / count.clamp(min=1), probability / count.clamp(min=1))
            found[(self, groups), "lbl"] = weight[groups] * per_group.sum() / (count > 0).sum().clamp(min=1)
        return found


def _rows(x: Tensor, token: Tensor | None) -> Tensor:
    """The row of each pair; None: one pair a token."""
    return x if token is None else x[token]
