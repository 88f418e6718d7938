"""The trial of a program that was written for the contract of `fsap`: what happens inside the sandbox.

In this order, each with a kind of its own: what the contract asks for is there ("contract"), the network is built, has
no more parameters than it may ("parameters") and no more multiplications ("macs"), a dry pass gives (2, classes)
("shape"), and after training on the images its predictions of others are finite numbers ("not finite"). The labels of
those others are not here: who called computes the accuracy.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.lib.core.sandbox.inside import Refused

METHODS = ("forward", "train_setup", "learn")
HYPERPARAMETERS = "supported_hyperparameters"


def warm() -> None:
    """One step of a network with what a program may use, so that no file has to be read later."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8),
        nn.GroupNorm(2, 8), nn.SiLU(),
        nn.MaxPool2d(2), nn.GELU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8),
        nn.Linear(8, 4),
    ]  # fmt: skip
    net = nn.Sequential(*parts)
    optimisers = (torch.optim.SGD(net.parameters(), 0.1, 0.9), torch.optim.Adam(net.parameters()))
    for optimiser in (*optimisers, torch.optim.AdamW(net.parameters())):
        optimiser.zero_grad()
        nn.CrossEntropyLoss()(net(torch.zeros(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 3, 8)
    F.interpolate(attention(x, x, x)[0][None], scale_factor=2).sum().backward()
    with FlopCounterMode(display=False), torch.no_grad():
        net(torch.zeros(2, 1, 8, 8))
    torch.save(repr(x), BytesIO())  # and what is refused is then named for what it does, not for what it would import


def trial(load: Callable[[], dict], job: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Try a program.

    Args:
        job: "channels", "height", "width", "classes", "prm" (the hyper-parameters), "most_params", "most_macs", "seed",
            "batch", and "epochs", 0 for a dry pass alone.
        tensors: "x" (rows, channels, height, width) and "y" (rows,) to train on, "asked" (others, ...) to predict.

    Returns:
        "params" and "macs" of an image, and "predicted", a class for each of "asked".
    """
    random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    names, prm, classes = load(), dict(job["prm"]), job["classes"]
    image = (job["channels"], job["height"], job["width"])
    build = _contract(names, prm)
    net = build((job["batch"], *image), (classes,), prm, torch.device("cpu"))
    if not isinstance(net, nn.Module):
        raise Refused("contract", "Net is no nn.Module")
    params = sum(p.numel() for p in net.parameters())
    if params > job["most_params"]:
        raise Refused("parameters", f"has {params}, more than {job['most_params']}")
    if not params:
        raise Refused("parameters", "has none")
    macs = _dry(net, image, classes)
    if macs > job["most_macs"]:
        raise Refused("macs", f"{macs} multiplications an image are more than {job['most_macs']}")
    found: dict[str, Any] = {"params": params, "macs": macs}
    if job["epochs"]:
        net.train_setup(prm)
        for epoch in range(job["epochs"]):
            net.learn(_Batches(tensors["x"], tensors["y"], job["batch"], job["seed"] + epoch))
        found["predicted"] = _predicted(net, tensors["asked"], classes)
    return found


def _contract(names: dict, prm: Mapping[str, Any]) -> Callable[..., Any]:
    build, declared = names.get("Net"), names.get(HYPERPARAMETERS)
    if not isinstance(build, type):
        raise Refused("contract", "has no class Net")
    lacking = [name for name in METHODS if not callable(getattr(build, name, None))]
    lacking += [] if callable(declared) else [HYPERPARAMETERS]
    if lacking:
        raise Refused("contract", f"lacks {', '.join(lacking)}")
    unknown = sorted(str(name) for name in set(declared()) - prm.keys())
    if unknown:
        raise Refused(
            "contract", f"asks for the hyper-parameters {', '.join(unknown)[:100]}, and there are {', '.join(prm)}"
        )
    return build


def _dry(net: nn.Module, image: tuple[int, ...], classes: int) -> int:
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = net(torch.zeros(2, *image))
    _check(out, 2, classes)
    return counter.get_total_flops() // 4  # of two images, an addition beside every multiplication


def _check(out: Any, rows: int, classes: int) -> None:
    if not isinstance(out, Tensor) or out.shape != (rows, classes):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise Refused("shape", f"{rows} images give {found} and not ({rows}, {classes})")


def _predicted(net: nn.Module, asked: Tensor, classes: int) -> list[int]:
    net.eval()
    with torch.no_grad():
        out = net(asked)
    _check(out, len(asked), classes)
    if not out.isfinite().all():
        raise Refused("not finite", "predictions are no finite numbers")
    return out.argmax(1).tolist()


class _Batches:
    """What `learn` goes over: pairs of images and labels, in an order drawn by the seed; all whole batches."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int):
        self.x, self.y, self.size = x, y, size
        self.order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.order[: len(self) * self.size].split(self.size):
            yield self.x[rows], self.y[rows]
