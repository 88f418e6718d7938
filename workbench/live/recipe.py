"""A recipe: everything that builds a training run, as plain values that go through JSON and come back the same.

The default is the live demonstration: a mixture-of-experts language model on three text domains, small enough for some
ten steps a second on one core. Importing this module is light; `build` imports torch.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

from workbench.errors import InputError, unknown

if TYPE_CHECKING:
    from workbench.lib.core.models import DecoderLM
    from workbench.lib.core.routing import Router
    from workbench.lib.core.task import LanguageModelling
    from workbench.lib.core.train import TrainConfig

BALANCE = 0.01
"""The usual coefficient of the Switch balance loss."""


def _value(default: Any, low: float = -math.inf, high: float = math.inf, help: str = "") -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": help})


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. Wrong types, values out of bounds and contradictions are an `InputError`.

    `help` in a field's metadata says what it is; `low` and `high` are its bounds, both included.
    """

    domains: tuple[str, ...] = _value(("python", "docs", "names"), help="text domains")
    cap: int = _value(262_144, 1024, 2**30, "bytes of each domain")
    seq_len: int = _value(128, 1, 4096, "bytes predicted per row")
    batch_size: int = _value(16, 1, 4096, "rows per step")
    d_model: int = _value(64, 1, 4096, "width of the model")
    n_layers: int = _value(4, 1, 64, "transformer blocks")
    n_heads: int = _value(4, 1, 64, "attention heads")
    n_experts: int = _value(8, 1, 512, "experts per layer")
    top_k: int = _value(2, 1, 512, "experts per token (expert-choice: on average)")
    d_hidden: int = _value(64, 1, 16_384, "hidden width of an expert")
    d_shared: int = _value(0, 0, 16_384, "hidden width of a shared expert; 0 for none")
    router: str = _value(
        "linear", help="linear, cosine, recurrent, fixed-random, hash, expert-choice or expert-choice-sigmoid"
    )
    balance: float | None = _value(
        None, 0, 10, f"coefficient of the balance loss (default: {BALANCE} if the router has one)"
    )
    z_loss: float = _value(0.0, 0, 10, "coefficient of the router z-loss")
    bias_rate: float = _value(0.0, 0, 1, "rate of the loss-free balancing bias; 0 for none")
    capacity_factor: float | None = _value(
        None, 0.01, 512, "pairs an expert serves, in fair shares (default: no limit)"
    )
    steps: int = _value(3000, 1, 10**8, "optimizer steps")
    lr: float = _value(3e-3, 1e-8, 1, "peak learning rate")
    warmup: int = _value(20, 0, 10**6, "steps of linear warm-up")
    seed: int = _value(0, 0, 2**31 - 1, "of everything random")
    eval_every: int = _value(100, 0, 10**8, "steps between evaluations; 0 for one at the end")
    eval_batches: int = _value(1, 1, 10**6, "batches of each domain per evaluation")
    checkpoint_every: int = _value(100, 0, 10**8, "steps between checkpoints; 0 for one at the end")
    threads: int = _value(1, 1, 256, "threads of the trainer; the same number gives the same numbers")
    layout: str = _value("data", help="how several processes share the training: data, sharded or experts")

    trainings: ClassVar[int] = 1
    cadence: ClassVar[Mapping[str, int]] = {}  # as `watch.Cadence` has it
    evaluations: ClassVar[int] = 0  # beside those of the training itself

    def __post_init__(self):
        for item in fields(self):
            value = _checked(item.name, getattr(self, item.name), _TYPES[item.name], item.metadata)
            object.__setattr__(self, item.name, value)
        from workbench.lib.data.sets import DOMAINS

        for domain in self.domains:
            if domain not in DOMAINS:
                raise unknown("domain", domain, DOMAINS)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise InputError(f"domains is {list(self.domains)} but must name at least one domain, and each once")
        if self.router not in ROUTERS:
            raise unknown("router", self.router, ROUTERS)
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.top_k > self.n_experts:
            raise InputError(f"top_k is {self.top_k} but must be between 1 and n_experts = {self.n_experts}")
        if self.d_model % self.n_heads:
            raise InputError(f"d_model is {self.d_model} but must be divisible by n_heads = {self.n_heads}")
        if self.router in WITHOUT_BALANCE:
            for name in ("balance", "z_loss", "bias_rate"):
                if getattr(self, name):
                    raise InputError(f"{name} is {getattr(self, name)} but the {self.router} router takes none")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe with these values in place of the defaults; an unknown name is an `InputError` with the nearest."""
        for name in values:
            if name not in _TYPES:
                raise unknown("recipe value", name, _TYPES)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON has them."""
        return asdict(self) | {"domains": list(self.domains)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def check_processes(self, processes: int) -> None:
        """Raise `InputError`, with the numbers that can, unless so many processes can share the training."""
        whole_batch = "capacity_factor" if self.capacity_factor is not None else None
        whole_batch = "router" if self.router.startswith("expert-choice") else whole_batch
        if processes > 1 and whole_batch:
            value = getattr(self, whole_batch)
            raise InputError(
                f"{whole_batch} is {value!r}, which decides over the whole batch: it trains in one process, not in "
                f"{processes}"
            )
        of = math.gcd(self.batch_size, self.n_experts if self.layout == "experts" else 0)
        fit = [n for n in range(1, of + 1) if of % n == 0]
        if processes not in fit:
            shares = f"batch_size = {self.batch_size}"
            shares += f" and n_experts = {self.n_experts}" if self.layout == "experts" else ""
            raise InputError(f"processes is {processes} but must share {shares} evenly: {', '.join(map(str, fit))} can")

    def train(self) -> None:
        """Build and train it."""
        from workbench.lib.core.train import train

        train(*self.build())

    def build(self) -> "tuple[DecoderLM, LanguageModelling, TrainConfig]":
        """The model with its initial weights, its task and how to train it: the same for the same recipe.

        Torch's global generator is left as it was. An `InputError` where a domain is not on this machine.
        """
        import torch

        from workbench.lib import data
        from workbench.lib.core.experts import GLU, GLUExperts
        from workbench.lib.core.models import DecoderLM
        from workbench.lib.core.moe import MoELayer
        from workbench.lib.core.task import LanguageModelling
        from workbench.lib.core.train import TrainConfig

        task = LanguageModelling(data.load("text-domains", domains=self.domains, cap=self.cap), self.seq_len)

        def ffn(layer: int) -> MoELayer:
            experts = GLUExperts(self.n_experts, self.d_model, self.d_hidden)
            shared = GLU(self.d_model, self.d_shared) if self.d_shared else None
            return MoELayer(routers[layer], experts, shared, self.capacity_factor)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            routers = ROUTERS[self.router](self)
            model = DecoderLM(task.vocab, self.d_model, self.n_layers, self.n_heads, ffn, self.seq_len)
        shared_names = {item.name for item in fields(TrainConfig)} & _TYPES.keys()
        return model, task, TrainConfig(**{name: getattr(self, name) for name in shared_names})


def _linear(recipe: Recipe) -> "list[Router]":
    from workbench.lib.core.routers import LinearRouter

    return [LinearRouter(*_sizes(recipe), **_options(recipe)) for _ in range(recipe.n_layers)]


def _cosine(recipe: Recipe) -> "list[Router]":
    from workbench.lib.routing.equifinality import CosineRouter

    d_space = min(16, recipe.d_model)
    return [CosineRouter(*_sizes(recipe), d_space, **_options(recipe)) for _ in range(recipe.n_layers)]


def _recurrent(recipe: Recipe) -> "list[Router]":
    from workbench.lib.routing.rmoe import recurrent_routers

    return recurrent_routers(recipe.n_layers, *_sizes(recipe), d_router=min(16, recipe.d_model), **_options(recipe))


def _fixed_random(recipe: Recipe) -> "list[Router]":
    from workbench.lib.core.routers import FixedRandomRouter

    return [FixedRandomRouter(*_sizes(recipe), **_options(recipe)) for _ in range(recipe.n_layers)]


def _hash(recipe: Recipe) -> "list[Router]":
    from workbench.lib.core.routers import HashRouter

    seeds = range(recipe.seed, recipe.seed + recipe.n_layers)  # a table of its own for each layer
    return [HashRouter(256, recipe.n_experts, recipe.top_k, seed=seed) for seed in seeds]


def _expert_choice(recipe: Recipe) -> "list[Router]":
    from workbench.lib.core.expert_choice import ExpertChoiceRouter

    capacity, score = recipe.top_k, "sigmoid" if recipe.router == "expert-choice-sigmoid" else "softmax"
    return [ExpertChoiceRouter(recipe.d_model, recipe.n_experts, capacity, score) for _ in range(recipe.n_layers)]


def _sizes(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.d_model, recipe.n_experts, recipe.top_k


def _options(recipe: Recipe) -> dict[str, Any]:
    coefficients = {"lbl": BALANCE if recipe.balance is None else recipe.balance}
    if recipe.z_loss:
        coefficients["z"] = recipe.z_loss
    return {"coefficients": coefficients, "bias_rate": recipe.bias_rate}


ROUTERS: dict[str, Callable[[Recipe], "list[Router]"]] = {
    "linear": _linear,
    "cosine": _cosine,
    "recurrent": _recurrent,
    "fixed-random": _fixed_random,
    "hash": _hash,
    "expert-choice": _expert_choice,
    "expert-choice-sigmoid": _expert_choice,
}
"""What `Recipe.router` may be: recipe -> the routers of all layers."""

LAYOUTS = ("data", "sharded", "experts")
"""What `Recipe.layout` may be: every process has the model, a part of each matrix, or some of the experts."""

WITHOUT_BALANCE = ("hash", "expert-choice", "expert-choice-sigmoid")
"""Routers that are balanced by construction and have no balance loss."""

_TYPES = {item.name: get_type_hints(Recipe)[item.name] for item in fields(Recipe)}


def _checked(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> Any:
    """`value` as the type that `hint` says, within its bounds; InputError otherwise."""
    if name == "domains":
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise InputError(f"domains is {value!r} but must be a list of names")
        return tuple(value)
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    words = {int: "a whole number", float: "a number", str: "a name"}[kind]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise InputError(f"{name} is {value!r} but must be {words}")
    if kind is not str and not bounds["low"] <= value <= bounds["high"]:  # NaN ends here too
        raise InputError(f"{name} is {value} but must be {words} between {bounds['low']} and {bounds['high']}")
    return kind(value)
