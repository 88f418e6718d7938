"""The checks of kinds, checked: honest specimens pass all of their kind, and one that breaks a rule is caught by it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kinds import CHECKS, Build, Make

# -- specimens: layers and images


class Layer(nn.Module):
    """Two linear layers; `change` is what it does to their output in place of nothing."""

    def __init__(self, change: Callable[["Layer", Tensor], Tensor] = lambda self, y: y, hidden: int = 16):
        super().__init__()
        self.up, self.down, self.change = nn.Linear(32, hidden), nn.Linear(hidden, 32), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.down(self.up(x).relu()))


class Unused(Layer):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(3))


class Unsaved(Layer):
    """A weight that is no parameter and no buffer."""

    def __init__(self):
        super().__init__(lambda self, y: y * self.factor)
        self.factor = torch.rand(32)


def remembers(layer: nn.Module, y: Tensor) -> Tensor:
    layer.seen = getattr(layer, "seen", 0) + 1
    return y * layer.seen


def drawn_apart(layer: nn.Module, y: Tensor) -> Tensor:
    return y * random.Random().random()


class Images(nn.Module):
    """A convolution whose rows, if `meet`, are normalised together."""

    def __init__(self, meet: bool = False):
        super().__init__()
        self.meet, self.convolution = meet, nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return y / y.std(0, correction=0).add(1) if self.meet else y


# -- merges


def average(base: dict[str, Tensor], experts: list[dict[str, Tensor]], factor: float = 1.0) -> dict[str, Tensor]:
    """Task arithmetic with equal weights."""

    def merged(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value + factor * torch.stack([expert[name] - value for expert in experts]).mean(0)

    return {name: merged(name, value) for name, value in base.items()}


def averages_counters(base, experts):
    return average(base, experts) | {"steps": experts[-1]["steps"]}


def widens(base, experts):
    return {name: value.double() for name, value in average(base, experts).items()}


def forgets_a_tensor(base, experts):
    return {name: value for name, value in average(base, experts).items() if name != "0.bias"}


def works_in_place(base, experts):
    for name, value in average(base, experts).items():
        base[name].copy_(value)
    return base


def drops_at_random(base, experts):
    return {
        n: v * (torch.rand(v.shape) < 0.9) if v.is_floating_point() else v for n, v in average(base, experts).items()
    }


def adds_up_models(base, experts):
    return {n: sum(e[n] for e in experts) if v.is_floating_point() else v for n, v in base.items()}


# -- optimisers


class Descent(torch.optim.Optimizer):
    """Gradient descent with momentum; `fault` is what is wrong with it."""

    def __init__(self, params, lr: float = 0.1, fault: str = ""):
        super().__init__(params, {"lr": lr})
        self.first_lr, self.fault, self.outside = lr, fault, {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            lr = self.first_lr if self.fault == "keeps its rate" else group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    if self.fault == "decays all":
                        p.mul_(0.99)
                    continue
                state = self.outside if self.fault == "state outside" else self.state
                kept = state.setdefault(p, {})
                kept["momentum"] = kept.get("momentum", torch.zeros_like(p)) * 0.5 + p.grad
                p.sub_(lr * kept["momentum"])
                if self.fault == "draws":  # no fault: training seeds torch at each step
                    p.add_(lr * 1e-3 * torch.randn_like(p))
                if self.fault == "draws unseeded":
                    p.add_(lr * random.Random().random())
                if self.fault == "vectors stand still" and p.ndim == 1:
                    p.zero_()


def descent(fault: str = "", lr: float = 0.1) -> Callable[[], Make]:
    return lambda: lambda params: Descent(params, lr, fault)


# -- simulators


@dataclass
class Report:
    step_seconds: float
    busy: list[float]


def queue(seed: int) -> Report:
    draw = random.Random(seed)
    waits = [draw.expovariate(1.0) for _ in range(5)]
    return Report(sum(waits), waits)


# -- data mixtures


def search(score: Callable[[Tensor], float], domains: int, seed: int, draws: int = 64) -> Tensor:
    """The best of random mixtures."""
    generator = torch.Generator().manual_seed(seed)
    tried = torch.rand(draws, domains, generator=generator).log().neg()
    tried = tried / tried.sum(1, keepdim=True)
    return tried[min(range(draws), key=lambda i: score(tried[i]))]


def even(score, domains, seed):
    return torch.full((domains,), 1 / domains)


def unfinished(score, domains, seed):
    return search(score, domains, seed) * 0.9


def asks_off_the_simplex(score, domains, seed):
    return search(lambda weights: score(weights * domains), domains, seed)


def unseeded(score, domains, seed):
    return search(score, domains, int(torch.randint(1000, ())))


def needs_a_best(score, domains, seed):
    assert score(torch.tensor([1.0, 0, 0, 0])) != score(torch.tensor([0, 0, 0, 1.0])), "nothing to choose"
    return search(score, domains, seed)


HONEST: dict[str, tuple[Callable[[], Any], ...]] = {
    "layer": (Layer, lambda: Layer(lambda self, y: nn.functional.dropout(y, 0.1, self.training))),
    "images": (Images, lambda: nn.Sequential(Images(), nn.Flatten(), nn.Linear(5 * 16 * 16, 2))),
    "merge": (lambda: average, lambda: lambda base, experts: average(base, experts, 0.3)),
    "optimiser": (
        descent(),
        descent("draws"),
        lambda: lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        lambda: lambda params: torch.optim.AdamW(params, 0.1),
    ),
    "simulator": (lambda: queue, lambda: lambda seed: {"total": {"wait_seconds": queue(seed).step_seconds}}),
    "data mixture": (lambda: search,),
}

BROKEN: dict[str, tuple[Callable[[], Any], ...]] = {
    "tokens_go_in_and_tokens_come_out": (
        lambda: Layer(lambda self, y: y[:, :16]),
        lambda: Layer(lambda self, y: y.double()),
        lambda: Layer(lambda self, y: y / 0),
    ),
    "images_go_in_and_a_row_an_image_comes_out": (
        lambda: Images(meet=True),
        lambda: nn.Sequential(Images(), nn.Flatten(0)),
    ),
    "the_example_is_small": (lambda: Layer(hidden=2000), nn.Identity),
    "every_trained_parameter_gets_a_finite_gradient": (
        Unused,
        lambda: Layer(lambda self, y: y.detach() + 0 * self.down.bias.sum()),
        lambda: Layer(lambda self, y: (y - y.detach()).sqrt()),
    ),
    "a_saved_and_loaded_module_computes_the_same": (Unsaved,),
    "the_same_seed_builds_and_computes_the_same_bits": (lambda: Layer(drawn_apart),),
    "evaluation_is_repeatable": (
        lambda: Layer(remembers),
        lambda: Layer(lambda self, y: nn.functional.dropout(y, 0.5, True)),
    ),
    "a_merge_keeps_names_shapes_dtypes_and_integers": (
        lambda: averages_counters,
        lambda: widens,
        lambda: forgets_a_tensor,
    ),
    "a_merge_changes_no_input_and_gives_the_same_bits_again": (lambda: works_in_place, lambda: drops_at_random),
    "copies_of_the_base_make_the_base": (lambda: adds_up_models,),
    "experts_that_differ_make_another_model": (lambda: lambda base, experts: dict(base),),
    "it_is_an_optimizer_that_halves_the_loss": (descent(lr=1e-5), descent(lr=1e3)),
    "what_has_no_gradient_is_left_alone": (descent("decays all"), descent("vectors stand still")),
    "a_learning_rate_of_zero_changes_nothing": (descent("keeps its rate"),),
    "the_same_steps_give_the_same_bits": (descent("draws unseeded"),),
    "it_goes_on_from_its_state_as_if_it_never_stopped": (descent("state outside"),),
    "the_seed_is_all_the_randomness": (
        lambda: lambda seed: {"step_seconds": random.random()},
        lambda: lambda seed: {"step_seconds": float(torch.rand(()))},
    ),
    "times_are_there_and_numbers_are_sound": (
        lambda: lambda seed: {"rate": 3.0},
        lambda: lambda seed: {"step_seconds": -0.1},
        lambda: lambda seed: {"step_seconds": 1.0, "rates": [2.0, float("inf")]},
    ),
    "weights_are_on_the_simplex_and_so_are_those_asked_for": (
        lambda: unfinished,
        lambda: asks_off_the_simplex,
        lambda: needs_a_best,
        lambda: lambda score, domains, seed: even(score, domains + 1, seed),
    ),
    "a_mixture_comes_below_the_even_one": (lambda: even,),
    "the_seed_is_all_the_randomness_of_a_mixture": (lambda: unseeded,),
}


def builder(example: Callable[[], Any]) -> Build:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return example()

    return build


@pytest.mark.parametrize(("kind", "i"), [(kind, i) for kind in HONEST for i in range(len(HONEST[kind]))])
def test_an_honest_specimen_passes(kind: str, i: int):
    for check in CHECKS[kind]:
        check(builder(HONEST[kind][i]))


NAMED = {check.__name__: (kind, check) for kind, checks in reversed(CHECKS.items()) for check in checks}


@pytest.mark.parametrize(("name", "i"), [(name, i) for name in BROKEN for i in range(len(BROKEN[name]))])
def test_a_broken_specimen_is_caught(name: str, i: int):
    with pytest.raises(AssertionError):
        NAMED[name][1](builder(BROKEN[name][i]))


def test_every_check_has_a_specimen_that_breaks_it_and_every_kind_an_honest_one():
    assert set(BROKEN) == set(NAMED) and set(HONEST) == set(CHECKS)


def test_a_result_that_is_not_plain_is_refused():
    for check in CHECKS["simulator"]:
        with pytest.raises(TypeError, match="not JSON serializable"):
            check(builder(lambda: lambda seed: {"step_seconds": torch.tensor(1.0)}))
