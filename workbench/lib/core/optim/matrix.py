"""What every optimiser of matrices does with a parameter, in one place.

    parameter                            is
    (O, I)                               a matrix
    (E, O, I)                            E matrices, as banks of experts have them; with "stacked": False one (O, I)
    (O, I, h), (O, I, h, w) and more     the matrix (O, I h w): a convolution's; of three dimensions: "stacked": False
    of one or no dimension, a side       no matrix: AdamW, `torch.optim`'s own
    above "max_side", "matrix": False
    of a DTensor (FSDP2)                 gathered, and every process makes the step of the whole matrix for its part

    gradient                             does
    None                                 nothing
    zero                                 an ordinary step, without division by zero
    not finite anywhere                  no step at all: `FloatingPointError`, nothing has changed
    sparse, complex                      `InputError`

"matrix", "stacked" and "max_side" are options of a parameter group, as all options are; `parameter_groups` makes groups
of a model. State and options are tensors and plain values: a state dict can be saved as it is, and from one a run goes
on bit for bit. One whose shapes do not fit is an `InputError`, before anything has changed.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from workbench.errors import InputError
from workbench.lib.core.optim.sharded import finite, parted, whole

MAX_SIDE = 32_000
"""A longer side is that of an embedding or a head."""

COUNTERS = ("step", "draws")
"""Entries of a state that count; they stay on the CPU."""

Group = dict[str, Any]
State = dict[str, Tensor]


class MatrixOptimizer(torch.optim.Optimizer):
    """An optimiser that changes matrices in its own way and all else by AdamW.

    A subclass says with what state a matrix begins, and which way it goes from its gradient:

        W <- (1 - lr weight_decay) W - lr direction(G)

    Args:
        params: parameters, or groups of them.
        lr, weight_decay: of all parameters; the decay is decoupled.
        betas, eps: of AdamW.
        options: the subclass's own, which groups may override too.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        **options: Any,
    ):
        shared = {"matrix": True, "stacked": True, "max_side": MAX_SIDE}
        own = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, shared | own | options)

    def check(self, group: Group, shape: torch.Size) -> None:
        """Raise `InputError` if the options of a group do not fit a matrix of it, of shape (*stack, O, I)."""

    def fresh(self, shape: torch.Size, group: Group, **where: Any) -> State:
        """The state a matrix (*stack, O, I) begins with, `where`: dtype and device; made anew at each call."""
        raise NotImplementedError

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Where a matrix goes against, of the shape of `grad` (*stack, O, I); changes `state`, and not `grad`.

        `grad` is float32 or wider. `state["step"]` is the number of steps before this one.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes gradients anew, and a loss that is returned.

        Raises:
            FloatingPointError: a gradient is not finite. Neither parameters nor states have changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            for p in given:
                if (shape := matrix_shape(p, group)) is not None:
                    self._step_matrix(p, shape, group)
            self._step_others([p for p in given if matrix_shape(p, group) is None], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a tensor keeps its type, where torch makes all of the parameter's: indices, float32 moments.

        Raises:
            InputError: a state is none of its parameter: it has other entries or shapes. Or the options of a group are
                not all there, as of another optimiser, or do not fit its parameters.
        """
        for group, then in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if missing := [name for name in self.defaults if name not in then]:
                raise InputError(f"state_dict has a group without {missing[0]!r}, so it is of another optimiser")
            if len(group["params"]) == len(then["params"]):
                self._check_group({**then, "params": group["params"]})
        mine, theirs = _flat(self.param_groups), _flat(state_dict["param_groups"])
        states = state_dict["state"]
        if len(mine) == len(theirs):  # else torch says what is wrong
            for (p, group), (i, then) in zip(mine, theirs, strict=True):
                if i in states:
                    self._check_state(i, p, states[i], {**group, **then})
        super().load_state_dict(state_dict)
        for (p, _), (i, _) in zip(mine, theirs, strict=True):
            for key, value in states.get(i, {}).items():
                self.state[p][key] = value.clone() if key in COUNTERS else value.to(p.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of all states, counters left out; of a DTensor the part that is here."""
        held = [t for state in self.state.values() for key, t in state.items() if key not in COUNTERS]
        return sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in held)

    def _check_group(self, group: Group) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if not 0 <= float(group[name]) < math.inf:
                raise InputError(f"{name} is {group[name]} but must be finite and at least 0")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise InputError(f"betas is {group['betas']} but both must be at least 0 and below 1")
        for p in group["params"]:
            if (shape := matrix_shape(p, group)) is not None:
                if not p.is_floating_point():
                    raise InputError(
                        f"params has {p.dtype} of shape {tuple(p.shape)} but matrices must be real numbers"
                    )
                self.check(group, shape)

    def _check_state(self, index: int, p: Tensor, state: State, group: Group) -> None:
        if (shape := matrix_shape(p, group)) is not None:
            wanted = {k: t.shape for k, t in self._begun(shape, group, dtype=_wide(p), device="meta").items()}
        else:
            wanted = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        found = {key: torch.as_tensor(value).shape for key, value in state.items()}
        if found != wanted:
            said = [", ".join(f"{k} {tuple(s)}" for k, s in sorted(shapes.items())) for shapes in (found, wanted)]
            raise InputError(
                f"state_dict has for parameter {index}, of shape {tuple(p.shape)}, {said[0]} but it must have {said[1]}"
            )

    def _refuse(self) -> None:
        """One pass over the gradients, before anything changes."""
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        for p in given:
            if p.grad.is_sparse or p.grad.is_complex():
                raise InputError(f"the gradient of a parameter {tuple(p.shape)} is sparse or complex and must not be")
        if not all(sound := finite([p.grad for p in given])):
            first = given[sound.index(False)]
            raise FloatingPointError(
                f"the gradients of {sound.count(False)} of {len(given)} parameters are not finite, the first of shape "
                f"{tuple(first.shape)}: no step was made"
            )

    def _begun(self, shape: torch.Size, group: Group, **where: Any) -> State:
        return {"step": torch.zeros(())} | self.fresh(shape, group, **where)

    def _step_matrix(self, p: Tensor, shape: torch.Size, group: Group) -> None:
        grad = whole(p.grad).to(_wide(p)).reshape(shape)  # of a convolution it may lie with its channels last
        state = self.state[p]
        if not state:
            state |= self._begun(shape, group, dtype=grad.dtype, device=grad.device)
        update = self.direction(grad, state, group)
        state["step"] += 1
        lr = float(group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        p.add_(parted(update.reshape(p.shape).to(p.dtype), p), alpha=-lr)

    def _step_others(self, params: list[Tensor], group: Group) -> None:
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p] |= {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        states = [self.state[p] for p in params]
        if params:
            adamw(
                params,
                [p.grad for p in params],
                *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def matrix_shape(p: Tensor, group: Group) -> torch.Size | None:
    """(*stack, O, I) as an optimiser of matrices sees a parameter; None where it is no matrix to it."""
    if not group["matrix"] or p.ndim < 2 or p.numel() == 0:
        return None
    shape = p.shape
    if p.ndim > 3 or (p.ndim == 3 and not group["stacked"]):
        shape = torch.Size((p.shape[0], math.prod(p.shape[1:])))
    return shape if max(shape[-2:]) <= group["max_side"] else None


def parameter_groups(model: nn.Module, weight_decay: float = 0.0, heads: Iterable[str] = ()) -> list[Group]:
    """The trained parameters of a model as groups: matrices, and those that are no matrices to such an optimiser.

    Embeddings, and what is tied to them, are no matrices, nor are `heads`: modules or parameters by name, a head or
    learned positions. Weight decay is that of all but vectors, embeddings and what is `undecayed`, no matrix either.

    Raises:
        InputError: the model has nothing called like one of `heads`.
    """
    modules, named, heads = dict(model.named_modules()), dict(model.named_parameters()), tuple(heads)
    if missing := [name for name in heads if name not in modules and name not in named]:
        raise InputError(f"heads has {missing} but the model has no module and no parameter of that name")

    def owned(kinds: type | tuple[type, ...]) -> set[int]:
        return {id(p) for m in modules.values() if isinstance(m, kinds) for p in m.parameters(recurse=False)}

    tables = owned((nn.Embedding, nn.EmbeddingBag)) | undecayed(model)
    lines = owned((nn.Conv1d, nn.ConvTranspose1d))
    out = {id(p) for name in heads for p in ([named[name]] if name in named else modules[name].parameters())}
    groups = {
        "matrices": {"params": [], "weight_decay": weight_decay},
        "lines": {"params": [], "weight_decay": weight_decay, "stacked": False},
        "others": {"params": [], "weight_decay": weight_decay, "matrix": False},
        "plain": {"params": [], "weight_decay": 0.0, "matrix": False},
    }
    for p in filter(lambda p: p.requires_grad, named.values()):
        if p.ndim < 2 or id(p) in tables:
            kind = "plain"
        elif id(p) in out:
            kind = "others"
        else:
            kind = "lines" if id(p) in lines else "matrices"
        groups[kind]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


def undecayed(model: nn.Module) -> set[int]:
    """The ids of the parameters that a module of the model names in its `undecayed`: weight decay is not for them."""
    return {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "undecayed", ())}


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _flat(groups: list[Group]) -> list[tuple[Any, Group]]:
    """Every parameter, or what stands for it, with the options of its group."""
    return [(p, {k: v for k, v in group.items() if k != "params"}) for group in groups for p in group["params"]]
