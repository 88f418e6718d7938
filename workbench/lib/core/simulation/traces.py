"""What the routers of a model said, token by token: what caches, schedulers and offload plans are tried on.

    trace = RouterTrace.read("mine.safetensors")     # probs (prompts, time, layers, experts)
    trace = zipf_markov(seed=0)                      # no router has ever said this

A trace is of real routers or says that it is synthetic (`source`). Independent draws would make every cache equal; what
a cache lives on is that routers drift slowly and that some experts are asked for more often than others.

Letters: R prompts, T time, L layers, E experts, K active experts, A layers ahead.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import InputError

AHEAD = 3
"""How many layers ahead gates are asked."""


@dataclass(frozen=True, eq=False)
class RouterTrace:
    """Routers' softmax over R prompts and what was generated after them.

    Attributes:
        source: where it comes from, in words.
        top_k: K, active experts of a token.
        prompt: how many of the T tokens are the prompt's; the others were generated one by one.
        probs: (R, T, L, E) of each layer's own router.
        ahead: (R, T, L, A, E) what the routers of the next A layers say of the hidden state that this layer's experts
            are about to see; 0 where no layer is left. None where nobody asked them.
    """

    source: str
    top_k: int
    prompt: int
    probs: Float[Tensor, "prompts time layers experts"]
    ahead: Float[Tensor, "prompts time layers ahead experts"] | None = None

    def __post_init__(self):
        if self.probs.ndim != 4 or 0 in self.probs.shape:
            raise InputError(
                f"probs has shape {tuple(self.probs.shape)} but must be (prompts, time, layers, experts), all above 0"
            )
        rows, time, layers, experts = self.probs.shape
        if not 1 <= self.top_k <= experts:
            raise InputError(f"top_k is {self.top_k} but must be from 1 to the {experts} experts of probs")
        if not 0 <= self.prompt < time:
            raise InputError(
                f"prompt is {self.prompt} but must leave one or more generated tokens of the {time} in probs"
            )
        if self.ahead is not None and (
            self.ahead.ndim != 5 or self.ahead.shape[:3] != (rows, time, layers) or self.ahead.shape[4] != experts
        ):
            raise InputError(
                f"ahead has shape {tuple(self.ahead.shape)} but must be ({rows}, {time}, {layers}, ahead, {experts})"
            )
        for name in ("probs", "ahead"):
            value = getattr(self, name)
            if value is not None and not (value.is_floating_point() and value.isfinite().all() and (value >= 0).all()):
                raise InputError(f"{name} must hold finite numbers of at least 0, in a floating-point type")
        if not (self.probs.sum(-1) > 0).all():
            raise InputError("probs is 0 for all experts of a token but must say something of each")

    @property
    def n_layers(self) -> int:
        return self.probs.shape[2]

    @property
    def n_experts(self) -> int:
        return self.probs.shape[3]

    def chosen(self) -> Int64[Tensor, "prompts time layers k"]:
        """The K experts of each token, the likeliest first."""
        return self.probs.topk(self.top_k).indices

    def reuse(self) -> float:
        """The share of a generated token's experts that the token before it had too; K / E for independent ones, and
        nan where there is one token alone.
        """
        mask = torch.zeros_like(self.probs, dtype=torch.bool).scatter_(-1, self.chosen(), True)
        start = max(self.prompt, 1)
        both = mask[:, start:] & mask[:, start - 1 : -1]
        return float(both.sum() / mask[:, start:].sum())

    def foreseen(self) -> list[float]:
        """The share of a token's experts that were foreseen, by how many layers ahead, 1 to A."""
        if self.ahead is None:
            return []
        mask = torch.zeros_like(self.probs, dtype=torch.bool).scatter_(-1, self.chosen(), True)
        found = []
        for away in range(1, min(self.ahead.shape[3], self.n_layers - 1) + 1):
            said = self.ahead[:, :, : self.n_layers - away, away - 1].topk(self.top_k).indices
            found.append(float(mask[:, :, away:].gather(-1, said).double().mean()))
        return found

    def write(self, path: str | Path) -> None:
        """A safetensors file that `read` reads."""
        from safetensors.torch import save_file

        tensors = {"probs": self.probs.contiguous()}
        if self.ahead is not None:
            tensors["ahead"] = self.ahead.contiguous()
        about = {"source": self.source, "top_k": self.top_k, "prompt": self.prompt}
        save_file(tensors, str(path), {"trace": json.dumps(about)})

    @classmethod
    def read(cls, path: str | Path) -> "RouterTrace":
        """A trace from its file.

        Raises:
            InputError: it cannot be read, is no such file, or holds no trace.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("trace", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"trace {str(path)!r} cannot be read: {error}") from None
        keys = {"source": str, "top_k": int, "prompt": int}
        if (
            not isinstance(about, dict)
            or any(type(about.get(key)) is not kind for key, kind in keys.items())
            or "probs" not in tensors
        ):
            raise InputError(
                f"trace {str(path)!r} must have a tensor 'probs' and, in its metadata under 'trace', JSON with source, "
                "top_k and prompt (RouterTrace.write makes it)"
            )
        try:
            return cls(*(about[key] for key in keys), tensors["probs"].float(), _float(tensors.get("ahead")))
        except InputError as error:
            raise InputError(f"trace {str(path)!r}: {error}") from None


def zipf_markov(
    seed: int = 0,
    prompts: int = 4,
    prompt: int = 16,
    generated: int = 32,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 4,
    skew: float = 1.0,
    stay: float = 0.7,
) -> RouterTrace:
    """A synthetic trace: experts as popular as Zipf's law has it, and logits that drift from token to token.

    Args:
        skew: of Zipf's law: the r-th expert has a share of r ** -skew.
        stay: correlation of the noise of two tokens that follow each other, from 0 to below 1.

    Raises:
        InputError: `stay` or a size is out of range.
    """
    if layers < 1:
        raise InputError(f"layers is {layers} but must be at least 1")
    if not 0 <= stay < 1:
        raise InputError(f"stay is {stay} but must be at least 0 and below 1")
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(experts, generator=draw) for _ in range(layers)]) + 1.0
    time = prompt + generated
    noise = torch.randn(prompts, time, layers, experts, generator=draw)
    for t in range(1, time):
        noise[:, t] = stay * noise[:, t - 1] + (1 - stay**2) ** 0.5 * noise[:, t]
    logits = -skew * ranks.log() + noise
    ahead = torch.zeros(prompts, time, layers, AHEAD, experts)
    for layer in range(layers):
        for away in range(1, min(AHEAD, layers - 1 - layer) + 1):  # a gate sees less of what is farther away
            blur = 0.5 * away**0.5 * torch.randn(prompts, time, experts, generator=draw)
            ahead[:, :, layer, away - 1] = torch.softmax(logits[:, :, layer + away] + blur, -1)
    return RouterTrace("synthetic, Zipf-Markov", top_k, prompt, torch.softmax(logits, -1), ahead)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
