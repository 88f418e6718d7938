"""Feed-forward blocks, whoever wrote them: what an expert that is a whole block needs to know of one.

A block is recognised by its parts, whatever they are called, and by number: two or three linear layers that fit, an
activation and nothing else that does anything; and what it computes for random input, in training and in evaluation, is
down(activation(gate x) * up x) or down(activation(up x)). It may be spread over two modules, as in BERT, where
`intermediate` gives what `output.dense` is given. A module that has the parts and computes something else, or holds
something else, is told from a block with the reason; its linear layers can be adapted each by itself.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lib.core.adapt.matrix import as_linear, is_linear

Activation = Callable[[Tensor], Tensor]
UNNAMED = (F.silu, F.gelu, F.relu, partial(F.gelu, approximate="tanh"))
"""What a block that holds no activation may call."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
SIZES = (1.0, 30.0, 300.0)
"""Of what the activation is given when a block is tried: a clamp shows in large numbers only."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One block: down(activation(gate x) * up x), or down(activation(up x)) without a gate.

    Attributes:
        module: the block itself.
        linears: its linear layers.
        gate, up: names of the input layers. The same name twice is one layer whose first half of outputs is the gate; a
            plain block has no gate.
        down: name of the output layer.
        activation: of each token by itself.
        elementwise: whether it is, too, of each hidden unit by itself, so that a block can be cut into slices.
        names: the linear layers' names in the model, by their names here.
        place: where in the module that was looked at a layer must go that is to take the place of the block.
        passed: the module that gives what `place` is given, and gives the block's input once the block is replaced.
    """

    module: nn.Module
    linears: dict[str, nn.Linear]
    gate: str | None
    up: str
    down: str
    activation: Activation
    elementwise: bool = True
    names: dict[str, str] = field(default_factory=dict)
    place: str = ""
    passed: nn.Module | None = None

    @property
    def fused(self) -> bool:
        """Whether gate and up are the two halves of one layer."""
        return self.gate is not None and self.gate == self.up

    @property
    def d_model(self) -> int:
        return self.linears[self.up].in_features

    @property
    def d_hidden(self) -> int:
        return self.linears[self.down].in_features

    def hidden(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gate x, up x), the first None without a gate, before the activation."""
        if self.fused:
            return self.linears[self.up](x).chunk(2, dim=-1)
        return None if self.gate is None else self.linears[self.gate](x), self.linears[self.up](x)

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """What the output layer is given."""
        return self.activation(up) if gate is None else self.activation(gate) * up

    def within(self, name: str) -> "FeedForward":
        """The block with the names its layers have in a model where it is called `name`."""
        return replace(self, names={key: f"{name}.{inside}".lstrip(".") for key, inside in self.names.items()})


class Split(nn.Module):
    """A block spread over two modules, as one: what gives the hidden units, and the output layer."""

    def __init__(self, intermediate: nn.Module, output: nn.Module):
        super().__init__()
        self.intermediate, self.output = intermediate, output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x))


def find_feed_forward(module: nn.Module) -> FeedForward | None:
    """The block that `module` is, or that it holds in two modules; None where it is and holds none."""
    found = recognise(module)
    return found if isinstance(found, FeedForward) else None


def recognise(module: nn.Module) -> FeedForward | str | None:
    """The block that `module` is or holds; why it is none, of one that looks like a block; or None."""
    if {"intermediate", "output"} <= module._modules.keys():
        return _split(module)
    children = dict(module.named_children())
    linears = {name: as_linear(part) for name, part in children.items() if is_linear(part)}
    forms = list(_forms(linears))
    if not forms:
        return None
    others = {name: part for name, part in children.items() if name not in linears}
    plain = {name: part for name, part in others.items() if not [*part.parameters(), *part.children()]}
    idle = (nn.Identity, *DROPOUTS)
    activations = [part for part in plain.values() if not isinstance(part, idle)] + _functions(module)
    reason = _reason(module, others, plain)
    if reason is None:
        names = {name: name for name in linears}
        ways = [(*form, activation) for form in forms for activation in (*activations, *UNNAMED)]
        reason = _checked(module, [FeedForward(module, linears, *way, names=names) for way in ways])
    return reason if activations or isinstance(reason, FeedForward) else None


def _reason(module: nn.Module, others: dict[str, nn.Module], plain: dict[str, nn.Module]) -> str | None:
    """What a module holds or is told that no block does."""
    for name, part in others.items():
        if name not in plain:
            return f"holds {name} ({type(part).__name__}) as well"
        if isinstance(part, DROPOUTS) and part.p > 0:
            return f"drops out {part.p:g} of its hidden units or outputs in training"
    for name in (*module._parameters, *module._buffers):
        return f"holds {name} as well"
    for name in list(inspect.signature(module.forward).parameters)[1:]:
        if name != "context":
            return f"is told {name} beside its input"
    return None


def _forms(linears: dict[str, nn.Linear]) -> Iterator[tuple[str | None, str, str]]:
    """(gate, up, down) for every way in which the layers fit, those first that follow the order of the module."""
    if len(linears) not in (2, 3):
        return
    for *inputs, down in permutations(linears):
        into, hidden = [linears[name] for name in inputs], linears[down].in_features
        if len({layer.in_features for layer in into}) > 1:
            continue
        if len(inputs) == 2 and all(layer.out_features == hidden for layer in into):
            yield inputs[0], inputs[1], down
        if len(inputs) == 1 and into[0].out_features == 2 * hidden:
            yield inputs[0], inputs[0], down
        if len(inputs) == 1 and into[0].out_features in (hidden, 2 * hidden):
            yield None, inputs[0], down


def _checked(module: nn.Module, blocks: list[FeedForward]) -> FeedForward | str:
    """The first of the blocks that computes what the module does, or why none is."""
    try:
        with tried(module):
            x = sample(blocks[0].linears[blocks[0].up])
            expected = {training: module.train(training)(x) for training in (True, False)}
            for block in blocks:
                if all(agree(partial(_formula, block, x), y) for y in expected.values()):
                    return replace(block, elementwise=_is_elementwise(block))
    except Exception as error:  # what others wrote may raise anything
        return f"cannot be called with its input alone: {error}"
    return "computes something else than its linear layers around an activation"


def _functions(module: nn.Module) -> list[Activation]:
    """What a module has as an attribute and can call, other than modules."""
    return [value for key, value in vars(module).items() if callable(value) and key[0] != "_" and key != "forward"]


def _formula(block: FeedForward, x: Tensor) -> Tensor:
    tokens = x.flatten(0, -2)  # as the experts are given them
    return block.linears[block.down](block.activate(*block.hidden(tokens))).view(*x.shape[:-1], -1)


def _is_elementwise(block: FeedForward) -> bool:
    like, part = block.linears[block.down].weight, (block.d_hidden + 1) // 2
    hidden = torch.linspace(-4, 4, 4 * block.d_hidden, device=like.device).to(like.dtype).view(block.d_hidden, 4).T
    try:
        return agree(lambda: block.activation(hidden[:, :part]), block.activation(hidden)[:, :part])
    except Exception:  # it wants a width of its own
        return False


def _split(module: nn.Module) -> FeedForward | str | None:
    """A block whose hidden units are what `intermediate` gives and `output.dense` is given."""
    first, last = module.intermediate, getattr(module.output, "dense", None)
    inside = [name for name, part in first.named_children() if is_linear(part)] if isinstance(first, nn.Module) else []
    if not isinstance(last, nn.Module) or not is_linear(last) or len(inside) != 1:
        return None
    name, joined = inside[0], Split(first, last)
    linears = {"intermediate": as_linear(first.get_submodule(name)), "output": as_linear(last)}
    if linears["intermediate"].out_features != linears["output"].in_features:
        return None
    others = [part for key, part in first.named_children() if key != name]
    if any(True for part in others for _ in part.parameters()):
        return "holds other parameters in intermediate"
    activations = [*others, *_functions(first), *UNNAMED]
    names = {"intermediate": f"intermediate.{name}", "output": "output.dense"}
    form = (None, "intermediate", "output")
    blocks = [FeedForward(joined, linears, *form, f, True, names, "output.dense", first) for f in activations]
    found = _checked(joined, blocks)
    if isinstance(found, FeedForward) and not _hands_over(module, first, last, linears["intermediate"]):
        return "does not show that output.dense is given what intermediate gives, and nothing else"
    return found


def _hands_over(module: nn.Module, first: nn.Module, last: nn.Module, up: nn.Linear) -> bool:
    """Whether `last` is given the very tensor that `first` gives, once each, in training and in evaluation."""
    ways = (getattr(module, name, None) for name in ("feed_forward_chunk", "ff_chunk", "forward"))
    way = next(way for way in ways if way is not None)
    for training in (True, False):
        with tried(module):
            given: list[Tensor] = []
            hooks = [first.register_forward_hook(lambda part, inputs, output, given=given: given.append(output))]
            hooks += [last.register_forward_pre_hook(lambda part, inputs, given=given: given.append(inputs[0]))]
            try:
                module.train(training)
                way(sample(up))
            except Exception:  # it wants to be told more
                return False
            finally:
                for hook in hooks:
                    hook.remove()
        if len(given) != 2 or given[0] is not given[1]:
            return False
    return True


# -- trying what others wrote


def sample(layer: nn.Linear) -> Tensor:
    """Random input (2, 3, I) for which what the layer gives has the sizes of `SIZES`. No global generator is used."""
    x = torch.randn(2, len(SIZES), layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(layer.weight)
    spread = F.linear(x, layer.weight).std()
    return x * (x.new_tensor(SIZES)[:, None] / (spread if spread > 0 else 1.0))


def agree(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether two computations give the same up to rounding. One that cannot be carried out does not."""
    try:
        y = compute()
    except Exception:  # such as halves that do not fit
        return False
    if y.shape != expected.shape or y.dtype != expected.dtype:
        return False
    near = (y - expected).abs() <= TOLERANCE.get(y.dtype, 1e-4) * expected.abs().amax(-1, keepdim=True)
    return bool((near | (y == expected) | (y.isnan() & expected.isnan())).all())


@contextmanager
def tried(module: nn.Module) -> Iterator[None]:
    """Whatever is run of `module` inside leaves nothing behind: no mode, number, buffer, hook's call or gradient.

    Parameters that are zero have random values inside: with zeros, any formula would do.
    """
    parts, hooks = list(module.modules()), ("_forward_hooks", "_forward_pre_hooks")
    modes = [part.training for part in parts]
    kept = {key: [dict(getattr(part, key)) for part in parts] for key in hooks}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    tensors = [p.detach() for p in module.parameters() if p.is_floating_point()]
    zeros = [p for p in tensors if not p.is_meta and not p.any()]
    devices = {p.device for p in tensors if p.device.type == "cuda"}
    try:
        for part in parts:
            for key in hooks:
                getattr(part, key).clear()
        with torch.no_grad(), torch.random.fork_rng(devices):
            for p in zeros:
                p.normal_()
            yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for p in zeros:
            p.zero_()
        for i, part in enumerate(parts):
            part.training = modes[i]
            for key in hooks:
                getattr(part, key).update(kept[key][i])
