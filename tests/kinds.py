"""What is tested of a system's `example()`, by its kind: the contracts in the head of `workbench/catalogue.py`.

A check takes `build`, which builds the example from a seed of torch's global generator, and asserts one property.
"""

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

Build = Callable[[int], Any]
Make = Callable[..., torch.optim.Optimizer]
WIDTH = 32
SHAPES = {"layer": (WIDTH,), "images": (3, 16, 16)}


def seeded(seed: int) -> None:
    """Every global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


# -- modules: a layer of tokens, or of images


def inputs(shape: tuple[int, ...], n: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(7))


def forward(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(11)  # of a router's noise, if it has any
    return module(x)


def tokens_go_in_and_tokens_come_out(build: Build) -> None:
    for n in (1, 7, 64):
        output = forward(build(0), inputs((WIDTH,), n))
        assert output.shape == (n, WIDTH) and output.dtype == torch.float32
        assert output.isfinite().all()


def images_go_in_and_a_row_an_image_comes_out(build: Build) -> None:
    module = build(0).eval()
    x = inputs(SHAPES["images"], 5)
    output = forward(module, x)
    assert output.ndim > 1 and len(output) == 5 and output.dtype == torch.float32
    assert output.isfinite().all()
    torch.testing.assert_close(output, torch.cat([forward(module, row) for row in x.split(1)]))


def the_example_is_small(build: Build) -> None:
    assert 0 < sum(p.numel() for p in build(0).parameters()) < 100_000


def of_modules(shape: tuple[int, ...]) -> tuple[Callable[[Build], None], ...]:
    """The checks of a module whose inputs are (N, *shape)."""

    def every_trained_parameter_gets_a_finite_gradient(build: Build) -> None:
        module = build(0).train()
        output = forward(module, inputs(shape, 512 if len(shape) == 1 else 8))
        # Not a sum of squares of the output alone: a layer that only rescales would get none from that.
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
        (output - target).square().mean().backward()
        trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        assert trained
        assert [name for name, grad in trained.items() if grad is None] == []
        assert [name for name, grad in trained.items() if not grad.isfinite().all()] == []
        assert any(grad.any() for grad in trained.values())

    def a_saved_and_loaded_module_computes_the_same(build: Build) -> None:
        saved, loaded = build(1).eval(), build(2).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_model(saved, str(Path(folder) / "model.safetensors"))
            load_model(loaded, str(Path(folder) / "model.safetensors"))
        assert torch.equal(forward(saved, inputs(shape, 64)), forward(loaded, inputs(shape, 64)))

    def the_same_seed_builds_and_computes_the_same_bits(build: Build) -> None:
        first, second = build(0).train(), build(0).train()
        for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
        assert torch.equal(forward(first, inputs(shape, 64)), forward(second, inputs(shape, 64)))

    def evaluation_is_repeatable(build: Build) -> None:
        """Without a seed set in between: nothing is drawn in evaluation mode, and nothing is carried over."""
        module = build(0).eval()
        with torch.no_grad():
            assert torch.equal(module(inputs(shape, 64)), module(inputs(shape, 64)))

    return (
        every_trained_parameter_gets_a_finite_gradient,
        a_saved_and_loaded_module_computes_the_same,
        the_same_seed_builds_and_computes_the_same_bits,
        evaluation_is_repeatable,
    )


# -- merges


def models(n: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The state dict of a small model with a counter in it, and of n that were trained from it."""
    generator = torch.Generator().manual_seed(3)

    def near(base: Tensor) -> Tensor:
        return base + 0.1 * torch.randn(base.shape, generator=generator)

    base = {"0.weight": torch.randn(12, 8, generator=generator), "0.bias": torch.randn(12, generator=generator)}
    base |= {"1.weight": torch.randn(4, 12, generator=generator)}
    experts = [{name: near(value) for name, value in base.items()} for _ in range(n)]
    for i, state in enumerate((base, *experts)):
        state["steps"] = torch.tensor(100 + i)
    return base, experts


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def a_merge_keeps_names_shapes_dtypes_and_integers(build: Build) -> None:
    base, experts = models(3)
    merged = build(0)(base, experts)
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        assert (value.shape, value.dtype) == (base[name].shape, base[name].dtype), name
        assert value.isfinite().all(), name
    assert merged["steps"] == base["steps"]


def a_merge_changes_no_input_and_gives_the_same_bits_again(build: Build) -> None:
    (base, experts), (base_before, experts_before) = models(3), models(3)
    first, second = build(0), build(0)
    merged = first(base, experts)
    assert same(base, base_before) and all(map(same, experts, experts_before))
    seeded(5)
    assert same(merged, first(base, experts)) and same(merged, second(base, experts))


def copies_of_the_base_make_the_base(build: Build) -> None:
    base, _ = models(0)
    merged = build(0)(base, [copy.deepcopy(base) for _ in range(3)])
    torch.testing.assert_close(merged, base)


def experts_that_differ_make_another_model(build: Build) -> None:
    base, experts = models(3)
    merged = build(0)(base, experts)
    assert any(not torch.equal(merged[name], base[name]) for name in base if name != "steps")


# -- optimisers


class Regression:
    """A linear regression with a matrix and a vector, and a parameter that nothing depends on."""

    def __init__(self, make: Make):
        generator = torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(64, 16, generator=generator), torch.randn(64, 8, generator=generator)
        self.y += self.x @ torch.randn(16, 8, generator=generator)
        self.weight, self.bias = nn.Parameter(torch.zeros(8, 16)), nn.Parameter(torch.zeros(8))
        self.idle = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.optimizer, self.made = make([self.weight, self.bias, self.idle]), 0

    def loss(self) -> Tensor:
        return (self.x @ self.weight.T + self.bias - self.y).square().mean()

    def steps(self, n: int) -> "Regression":
        for _ in range(n):
            torch.manual_seed(self.made)  # as training does, for an optimiser that draws
            self.made += 1
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.optimizer.step()
        return self

    def values(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach().clone() for name in ("weight", "bias", "idle")}


def it_is_an_optimizer_that_halves_the_loss(build: Build) -> None:
    problem = Regression(build(0))
    assert isinstance(problem.optimizer, torch.optim.Optimizer)
    before = problem.loss().item()
    assert problem.steps(100).loss().item() < 0.5 * before


def what_has_no_gradient_is_left_alone(build: Build) -> None:
    problem = Regression(build(0))
    before = problem.values()
    after = problem.steps(3).values()
    assert torch.equal(after["idle"], before["idle"])
    assert not torch.equal(after["weight"], before["weight"]) and not torch.equal(after["bias"], before["bias"])


def a_learning_rate_of_zero_changes_nothing(build: Build) -> None:
    problem = Regression(build(0)).steps(2)
    before = problem.values()
    for group in problem.optimizer.param_groups:
        group["lr"] = 0.0
    assert same(problem.steps(1).values(), before)


def the_same_steps_give_the_same_bits(build: Build) -> None:
    first = Regression(build(0)).steps(5).values()
    assert same(first, Regression(build(0)).steps(5).values())


def it_goes_on_from_its_state_as_if_it_never_stopped(build: Build) -> None:
    whole, part = Regression(build(0)).steps(3), Regression(build(0)).steps(3)
    rest = Regression(build(0))
    rest.made = part.made
    with torch.no_grad():
        for name, value in part.values().items():
            getattr(rest, name).copy_(value)
    rest.optimizer.load_state_dict(copy.deepcopy(part.optimizer.state_dict()))
    assert same(whole.steps(4).values(), rest.steps(4).values())


# -- simulators


def plain(result: Any) -> Any:
    """The result as JSON has it, or an error from json; NaN and infinities are let through."""
    return json.loads(json.dumps(asdict(result) if is_dataclass(result) else result))


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a plain value, with the name it is under."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, name)
    elif isinstance(value, int | float):
        yield name, value


def the_seed_is_all_the_randomness(build: Build) -> None:
    simulate = build(0)
    for seed in (0, 1):
        seeded(2)
        first = plain(simulate(seed))
        seeded(3)
        assert plain(simulate(seed)) == first == plain(build(0)(seed))


def times_are_there_and_numbers_are_sound(build: Build) -> None:
    for seed in range(3):
        found = list(numbers(plain(build(0)(seed))))
        assert [name for name, value in found if not math.isfinite(value)] == []
        times = [value for name, value in found if name.endswith("seconds")]
        assert times and min(times) >= 0


# -- data mixtures

DOMAINS = 4
BEST = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64)


def bowl(weights: Tensor) -> float:
    """A score that is least at `BEST`."""
    return float((weights.double() - BEST).square().sum())


def on_the_simplex(weights: Tensor) -> bool:
    return (
        weights.shape == (DOMAINS,)
        and weights.is_floating_point()
        and bool((weights >= 0).all())
        and math.isclose(float(weights.double().sum()), 1.0, abs_tol=1e-6)
    )


def weights_are_on_the_simplex_and_so_are_those_asked_for(build: Build) -> None:
    for score in (bowl, lambda weights: 1.0):

        def checked(weights: Tensor, score: Callable[[Tensor], float] = score) -> float:
            assert on_the_simplex(weights)
            return score(weights)

        assert on_the_simplex(build(0)(checked, DOMAINS, 0))


def a_mixture_comes_below_the_even_one(build: Build) -> None:
    even = torch.full((DOMAINS,), 1 / DOMAINS, dtype=torch.float64)
    for seed in range(3):
        assert bowl(build(0)(bowl, DOMAINS, seed)) < bowl(even)


def the_seed_is_all_the_randomness_of_a_mixture(build: Build) -> None:
    mix = build(0)
    seeded(2)
    first = mix(bowl, DOMAINS, 4)
    seeded(3)
    assert torch.equal(mix(bowl, DOMAINS, 4), first)
    assert torch.equal(build(0)(bowl, DOMAINS, 4), first)


CHECKS: dict[str, tuple[Callable[[Build], None], ...]] = {
    "layer": (tokens_go_in_and_tokens_come_out, the_example_is_small, *of_modules(SHAPES["layer"])),
    "images": (images_go_in_and_a_row_an_image_comes_out, the_example_is_small, *of_modules(SHAPES["images"])),
    "merge": (
        a_merge_keeps_names_shapes_dtypes_and_integers,
        a_merge_changes_no_input_and_gives_the_same_bits_again,
        copies_of_the_base_make_the_base,
        experts_that_differ_make_another_model,
    ),
    "optimiser": (
        it_is_an_optimizer_that_halves_the_loss,
        what_has_no_gradient_is_left_alone,
        a_learning_rate_of_zero_changes_nothing,
        the_same_steps_give_the_same_bits,
        it_goes_on_from_its_state_as_if_it_never_stopped,
    ),
    "simulator": (the_seed_is_all_the_randomness, times_are_there_and_numbers_are_sound),
    "data mixture": (
        weights_are_on_the_simplex_and_so_are_those_asked_for,
        a_mixture_comes_below_the_even_one,
        the_seed_is_all_the_randomness_of_a_mixture,
    ),
}
