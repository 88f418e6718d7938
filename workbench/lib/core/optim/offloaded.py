"""AdamW whose states lie in host memory: weights and gradients alone are on the device (ZeRO-Offload, 2101.06840).

    optimizer = OffloadedAdamW(model.parameters(), lr=1e-3)      # the model in half precision, on any device
    with optimizer.streaming():                                  # gradients leave the device as they are produced
        loss.backward()
    optimizer.clip(1.0)
    optimizer.step()                                             # on the host; the weights go back

The host has a copy of each weight in single precision, and its two moments: 12 bytes a parameter, with 4 for a gradient
until the step. The device has the weights, and of the gradients a bucket. Without `streaming` it is an optimiser like
any other: gradients are on the device until the step, where whoever clips them expects them. Weights that somebody else
has changed since the last step, in place, are read anew.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import InputError


class OffloadedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` on the host, of parameters anywhere: the same bits on the same gradients.

    Args:
        params, lr, betas, eps, weight_decay: as AdamW has them; read from the groups at each step.
        bucket_bytes: gradients that are on the device at once while they stream, at least; the last to come makes it
            more.

    Attributes:
        largest_bucket: bytes of gradients that were on the device at once, in all streaming so far.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bucket_bytes: int = 2**25,
    ):
        if bucket_bytes < 1:
            raise InputError(f"bucket_bytes is {bucket_bytes} but must be at least 1")
        self.bucket_bytes, self.largest_bucket = bucket_bytes, 0
        self._masters: dict[Tensor, nn.Parameter] = {}
        self._versions: dict[Tensor, int] = {}
        self._bucket: dict[Tensor, None] = {}
        self._adamw: torch.optim.AdamW | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            wide = torch.promote_types(p.dtype, torch.float32)
            self._masters[p] = nn.Parameter(p.detach().to("cpu", wide, copy=True))
            self._versions[p] = p._version
        own = group | {"params": [self._masters[p] for p in group["params"]]}
        if self._adamw is None:
            self._adamw = torch.optim.AdamW([own], foreach=False)
        else:
            self._adamw.add_param_group(own)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Backward passes inside leave their gradients on the host, bucket by bucket; several add up."""
        trained = [p for p in self._masters if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(self._produced) for p in trained]
        try:
            yield
            self._fetch(self._bucket)
        finally:
            self._bucket = {}
            for hook in hooks:
                hook.remove()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm is at most `max_norm`; the norm before."""
        self._fetch_all()
        return nn.utils.clip_grad_norm_(self._masters.values(), max_norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fetch_all()
        self._tell()
        for p, master in self._masters.items():
            if p._version != self._versions[p]:  # what is as it was keeps the bits that only the master has
                now = p.detach().to("cpu", master.dtype)
                master.copy_(torch.where(master.to(p.dtype).to(master.dtype) == now, master, now))
        self._adamw.step()
        for p, master in self._masters.items():
            if master.grad is not None:
                p.copy_(master)
                master.grad = None
            self._versions[p] = p._version
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for master in self._masters.values():
            master.grad = None

    def host_bytes(self) -> dict[str, int]:
        """Bytes on the host: of "states", weights and moments of single precision, and of "gradients"."""
        moments = [s[name] for s in self._adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
        gradients = [m.grad for m in self._masters.values() if m.grad is not None]
        return {"states": _bytes([*self._masters.values(), *moments]), "gradients": _bytes(gradients)}

    def state_dict(self) -> dict[str, Any]:
        """As AdamW has it, with the "master" of each parameter beside its moments."""
        self._tell()
        found = self._adamw.state_dict()
        states = {i: {"master": master.detach()} for i, master in enumerate(self._masters.values())}
        return found | {"state": {i: found["state"].get(i, {}) | own for i, own in states.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there: the weights are those of the masters."""
        states = {i: dict(own) for i, own in state_dict["state"].items()}
        masters = {i: own.pop("master", None) for i, own in states.items()}
        if lacking := [i for i in range(len(self._masters)) if masters.get(i) is None]:
            raise InputError(f"state_dict has no master of parameter {lacking[0]}: it is none of an OffloadedAdamW")
        for i, master in enumerate(self._masters.values()):
            if masters[i].shape != master.shape:
                its, own = tuple(masters[i].shape), tuple(master.shape)
                raise InputError(f"state_dict has a master of shape {its} of parameter {i} but must have {own}")
        moments = deepcopy({i: own for i, own in states.items() if own})  # torch would go on in those it is given
        self._adamw.load_state_dict(state_dict | {"state": moments})
        for i, (p, master) in enumerate(self._masters.items()):
            master.copy_(masters[i])
            p.copy_(master)
            self._versions[p] = p._version
        unlike = set(self._adamw.defaults) - set(self.defaults)  # what only AdamW has
        for mine, its in zip(self.param_groups, self._adamw.param_groups, strict=True):
            mine.update({name: value for name, value in its.items() if name != "params" and name not in unlike})

    def _tell(self) -> None:
        """The settings of the groups, to whom makes the step."""
        for mine, its in zip(self.param_groups, self._adamw.param_groups, strict=True):
            its.update({name: value for name, value in mine.items() if name != "params"})

    def _produced(self, p: Tensor) -> None:
        self._bucket[p] = None
        held = _bytes([q.grad for q in self._bucket if q.grad is not None])
        self.largest_bucket = max(self.largest_bucket, held)
        if held >= self.bucket_bytes:
            self._fetch(self._bucket)
            self._bucket = {}

    def _fetch_all(self) -> None:
        self._fetch(self._masters)

    def _fetch(self, parameters: Iterable[Tensor]) -> None:
        """Their gradients to the host, and from the device."""
        for p in parameters:
            if p.grad is None:
                continue
            master, gradient = self._masters[p], p.grad.to("cpu", self._masters[p].dtype)
            master.grad = gradient if master.grad is None else master.grad + gradient
            p.grad = None


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
