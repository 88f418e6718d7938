"""Schedules and samplers: diffusers' schedulers as oracles, closed forms, and what is refused."""

import math
import warnings
from itertools import pairwise

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core import diffusion
from workbench.lib.core.diffusion import VP, Discrete, add_noise, guided, path, sample, step

NAMES = {"linear": "linear", "linear-sqrt": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.fixture(scope="module")
def peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDIMScheduler, DDPMScheduler
    return DDIMScheduler, DDPMScheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(peer, kind, size, spacing, **options):
    """Our schedule and a scheduler of diffusers with the same betas."""
    betas = {} if kind == "cosine" else {"start": 1e-3, "end": 0.03}
    theirs = {"beta_start": 1e-3, "beta_end": 0.03} if betas else {}
    other = peer(size, beta_schedule=NAMES[kind], timestep_spacing=spacing, **theirs, **options)
    return Discrete(kind, size, spacing=spacing, **betas), other


@pytest.mark.parametrize("kind", NAMES)
def test_alpha_bar_is_that_of_diffusers(kind, peers):
    ours, theirs = pair(peers[0], kind, 200, "leading")
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-3)
    t = torch.tensor([0, 7, 199])
    torch.testing.assert_close(ours.signal(t) ** 2 + ours.noise(t) ** 2, torch.ones(3).double())
    x, noise = torch.randn(2, 3, 4, 5, generator=seeded()).unbind()
    torch.testing.assert_close(add_noise(ours, x, noise, t), theirs.add_noise(x, noise, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 50, 120, 200])
def test_levels_are_those_of_diffusers(spacing, steps, peers):
    ours, theirs = pair(peers[0], "linear", 200, spacing)
    theirs.set_timesteps(steps)
    levels = ours.levels(steps)
    assert levels.tolist() == [*theirs.timesteps.tolist(), -1]
    assert spacing == "leading" or levels[0] == 199
    assert len(set(levels.tolist())) == steps + 1


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(eta, clip, spacing, peers):
    options = {"clip_sample": clip is not None, "prediction_type": "epsilon"}
    ours, theirs = pair(peers[0], "linear", 200, spacing, **options)
    theirs.set_timesteps(20)  # divides 200: see the module's docstring
    x = torch.randn(4, 1, 8, 8, generator=seeded(1))
    for i, (t, to) in enumerate(pairwise(ours.levels(20))):
        predicted = torch.randn(x.shape, generator=seeded(100 + i))
        expected = theirs.step(predicted, int(t), x, eta, clip is not None, seeded(i)).prev_sample
        x = step(ours, x, predicted, t, to, eta, seeded(i), clip)
        torch.testing.assert_close(x, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("steps", [7, 200])
@pytest.mark.parametrize("kind", ["linear", "linear-sqrt"])
def test_ancestral_steps_are_those_of_diffusers_over_any_levels(kind, steps, peers):
    ours, theirs = pair(peers[1], kind, 200, "trailing", clip_sample=True, variance_type="fixed_small")
    theirs.set_timesteps(steps)
    x = torch.randn(4, 1, 8, 8, generator=seeded(1))
    levels = ours.levels(steps)
    for i, (t, to) in enumerate(pairwise(levels)):
        predicted = torch.randn(x.shape, generator=seeded(100 + i))
        expected = theirs.step(predicted, t, x, generator=seeded(i)).prev_sample
        x = step(ours, x, predicted, t, to, 1.0, seeded(i), 1.0)
        torch.testing.assert_close(x, expected, atol=2e-4, rtol=2e-4)


def test_vp_is_the_limit_of_the_linear_schedule_and_has_its_closed_form():
    schedule = VP()
    t = torch.tensor([0.0, 0.02, 0.5, 1.0])
    expected = torch.exp(-(t.double() ** 2) * 19.9 / 4 - t.double() * 0.05)
    torch.testing.assert_close(schedule.signal(t), expected)
    torch.testing.assert_close(schedule.noise(t) ** 2, 1 - expected**2)
    assert schedule.signal(t)[0] == 1 and schedule.noise(t)[0] == 0
    fine = Discrete("linear", 100_000)  # beta from 0.1 / T to 20 / T
    at = torch.tensor([9_999, 49_999, 99_999])
    torch.testing.assert_close(fine.signal(at), schedule.signal((at + 1) / 100_000), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("schedule", [Discrete("cosine", 200), Discrete("linear", 200), VP()])
def test_the_true_noise_leads_back_to_the_data(schedule):
    data = torch.randn(1, 6, generator=seeded(3)).double().expand(5, 6)

    def predict(x, t):
        s, g = schedule.signal(t)[:, None], schedule.noise(t)[:, None]
        return ((x.double() - s * data) / g).float()

    for eta in (0.0, 1.0):
        found = sample(predict, (5, 6), schedule, 50, seeded(), eta)
        torch.testing.assert_close(found, data.float(), atol=1e-3, rtol=0)


def test_gaussian_data_is_drawn_with_its_mean_and_deviation():
    """x_0 ~ N(2, 0.5^2): the best prediction is known, and a thousand draws show whether the steps use it rightly."""
    for schedule in (Discrete("cosine", 1000), VP(first=0.001)):

        def predict(x, t, schedule=schedule):
            s, g = schedule.signal(t)[:, None].float(), schedule.noise(t)[:, None].float()
            return g * (x - 2 * s) / (0.25 * s**2 + g**2)

        for eta in (0.0, 1.0):
            found = sample(predict, (4000, 1), schedule, 100, seeded(), eta)
            assert abs(float(found.mean()) - 2) < 0.04 and abs(float(found.std()) - 0.5) < 0.03


def test_one_generator_gives_one_draw_and_the_path_has_every_level():
    schedule = Discrete("cosine", 50)

    def draw(seed):
        return list(path(lambda x, t: 0.1 * x, (3, 2), schedule, 5, seeded(seed), 1.0))

    first, again, other = draw(0), draw(0), draw(1)
    assert len(first) == 6 and [int(t) for t, _ in first] == schedule.levels(5).tolist()
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1][1], other[-1][1])


def test_guidance_is_exact_at_its_ends_and_linear():
    null, conditional = torch.randn(2, 100, generator=seeded()).unbind()
    assert torch.equal(guided(null, conditional, 1.0), conditional)
    assert torch.equal(guided(null, conditional, 0.0), null)
    for weight in (-1.0, 0.3, 2.0, 7.5):
        torch.testing.assert_close(guided(null, conditional, weight), null + weight * (conditional - null))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Discrete("sqrt"), "kind 'sqrt' is unknown"),
        (lambda: Discrete(spacing="middle"), "spacing 'middle' is unknown"),
        (lambda: Discrete(size=0), "size is 0"),
        (lambda: Discrete(start=0.5, end=0.1), "start and end are 0.5 and 0.1"),
        (lambda: Discrete(size=10), "start and end are 0.01 and 2.0"),
        (lambda: Discrete("cosine", start=0.1), "the cosine schedule has none"),
        (lambda: Discrete(size=100).levels(101), "steps is 101 but must be 1 to 100"),
        (lambda: Discrete(size=100).levels(0), "steps is 0"),
        (lambda: Discrete().signal(torch.tensor([1000])), "must be -1"),
        (lambda: Discrete().signal(torch.tensor([0.5])), "whole numbers"),
        (lambda: VP(b0=0.0), "b0 and b1 are 0.0"),
        (lambda: VP(first=1.0), "first is 1.0"),
        (lambda: VP().levels(0), "steps is 0"),
        (lambda: VP().noise(torch.tensor([1.5])), "t is 1.5"),
        (lambda: VP().noise(torch.tensor([math.nan])), "t is nan"),
        (lambda: guided(torch.zeros(1), torch.zeros(1), math.inf), "weight is inf"),
        (lambda: add_noise(VP(), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1)), "noise and t are"),
    ],
)
def test_what_is_refused(act, said):
    with pytest.raises(InputError, match=said):
        act()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": 0.5}, "a generator must be given"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"predicted": torch.zeros(2, 4)}, "predicted is"),
        ({"to": torch.tensor(6)}, "to is 6 but must be one level below t"),
    ],
)
def test_a_step_refuses(options, said):
    values = {"predicted": torch.zeros(2, 3), "t": torch.tensor(5), "to": torch.tensor(4)} | options
    with pytest.raises(InputError, match=said):
        step(Discrete(), torch.zeros(2, 3), **values)
