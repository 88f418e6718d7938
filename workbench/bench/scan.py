"""The selective scan of a Mamba layer, beside the CPU path of transformers and a doubling scan in torch.

All do the same: softplus of the steps, the scan, the skip and the SiLU gate, and the last state. transformers has its
function for the processor, one step after the other. The doubling scan combines pairs 1, 2, 4, ... steps apart, all
(B, I, N, L) of them, and its gradient is such a scan backwards.

Beside the timings, "memory" has the most that each needs, its inputs among it, over inputs and outputs; and "left_out"
who has no row of a direction, and why.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.bench.core import BOTH, FORWARD, OURS, Case, Contestants
from workbench.kernels import selective_scan
from workbench.kernels.memory import peak_bytes

REPEATS = 3
TRANSFORMERS, DOUBLING = "transformers", "torch/doubling"
QUICK = ((2, 5, 3, 9),)
SHAPES = ((4, 256, 16, 512), (1, 512, 16, 4096))  # B, I, N, L
MOST = 1024
"""Steps up to which transformers' path is timed backwards: each step makes a gradient of all steps."""

Scan = Callable[..., tuple[Tensor, Tensor]]


def cases(quick: bool = False) -> list[Case]:
    return [Case(_name(shape), partial(_contestants, shape)) for shape in (QUICK if quick else SHAPES)]


def tables(quick: bool = False) -> dict[str, list[dict]]:
    """What each needs, and who is left out.

    Returns:
        {"memory": rows {case, direction, implementation, peak_bytes: beyond the inputs, ratio_to_data: of inputs and
        peak over inputs and outputs}, "left_out": rows {case, direction, implementation, reason}}.
    """
    memory, left_out = [], []
    for shape in QUICK if quick else SHAPES:
        for direction in (FORWARD, BOTH):
            problem, case = Problem(shape), {"case": _name(shape), "direction": direction}
            inputs, outputs = problem.n_bytes(direction)
            for name, scan in problem.scans().items():
                if (reason := absent(name, shape, direction)) is not None:
                    left_out.append(case | {"implementation": name, "reason": reason})
                    continue
                Problem(QUICK[0]).call(scan, direction)  # what is imported by the first call is none of its needs
                if (peak := peak_bytes(partial(problem.call, scan, direction))) is not None:
                    ratio = round((inputs + peak) / (inputs + outputs), 2)
                    memory.append(case | {"implementation": name, "peak_bytes": peak, "ratio_to_data": ratio})
    return {"memory": memory, "left_out": left_out}


def absent(name: str, shape: tuple[int, ...], direction: str) -> str | None:
    """Why there is no row; None where there is one."""
    if name != TRANSFORMERS:
        return None
    try:
        _transformers()
    except ImportError as error:
        return f"not installed: {error}"
    if direction == BOTH and shape[-1] > MOST:
        return f"its backward grows with the square of the {shape[-1]} steps, and takes minutes from {MOST} on"
    return None


class Problem:
    """What a layer gives to its scan, and gradients of what it takes."""

    def __init__(self, shape: tuple[int, int, int, int]):
        batch, channels, states, steps = shape
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        self.x, self.z, self.grad = (draw(batch, channels, steps) for _ in range(3))
        self.delta = draw(batch, channels, steps) - 3  # steps about 0.05
        self.a = -torch.arange(1.0, states + 1).repeat(channels, 1)
        self.b, self.c = (draw(batch, states, steps) for _ in range(2))
        self.d, self.grad_last = torch.ones(channels), draw(batch, channels, states)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, self.delta, self.a, self.b, self.c, self.d, self.z]

    def n_bytes(self, direction: str) -> tuple[int, int]:
        """Of (inputs, outputs); backward there are the gradients of the outputs among the first, and the others."""
        inputs, outputs = sum(t.nbytes for t in self.inputs), self.grad.nbytes + self.grad_last.nbytes
        return (inputs + outputs,) * 2 if direction == BOTH else (inputs, outputs)

    def scans(self) -> dict[str, Scan]:
        return {OURS: selective_scan, TRANSFORMERS: _transformers_scan, DOUBLING: doubling}

    def call(self, scan: Scan, direction: str) -> list[Tensor]:
        """y and the last state, and in both directions the gradients."""
        given = [tensor.detach().requires_grad_(direction == BOTH) for tensor in self.inputs]
        if direction == FORWARD:
            with torch.no_grad():
                return list(scan(*given))
        outputs = scan(*given)
        return [*outputs, *torch.autograd.grad(outputs, given, (self.grad, self.grad_last))]


def doubling(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """As `selective_scan` from zero, by doubling."""
    step = F.softplus(delta)
    decay = torch.exp(step[:, :, None] * a[:, :, None])
    h = _Doubling.apply(decay, (step * x)[:, :, None] * b[:, None])
    y = (h * c[:, None]).sum(2) + d[:, None] * x
    return y * F.silu(z), h[..., -1]


class _Doubling(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + new_t along the last dimension."""

    @staticmethod
    def forward(ctx, decay: Tensor, new: Tensor) -> Tensor:
        h = _doubled(decay.clone(), new.clone())
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        following = F.pad(decay[..., 1:], (0, 1)).flip(-1)
        g = _doubled(following, grad.flip(-1)).flip(-1)
        return g * F.pad(h[..., :-1], (1, 0)), g


def _doubled(decay: Tensor, h: Tensor) -> Tensor:
    """In their place."""
    apart, steps = 1, h.shape[-1]
    while apart < steps:
        h[..., apart:] += decay[..., apart:] * h[..., :-apart]
        decay[..., apart:] = decay[..., apart:] * decay[..., :-apart]
        apart *= 2
    return h


def _transformers():
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan


def _transformers_scan(x, delta, a, b, c, d, z) -> tuple[Tensor, Tensor]:
    return _transformers()(x, delta, a, b, c, D=d, z=z, delta_softplus=True, return_last_state=True)


def _name(shape: tuple[int, ...]) -> str:
    return "B={} I={} N={} L={}".format(*shape)


def _contestants(shape: tuple[int, int, int, int], direction: str) -> Contestants:
    problem = Problem(shape)
    return {
        name: partial(problem.call, scan, direction)
        for name, scan in problem.scans().items()
        if absent(name, shape, direction) is None
    }
