"""OFDM under phase noise: what Fourier and Gauss say exactly, closed forms against draws, and wrong input."""

import math

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.lib.dynamics import expected
from workbench.lib.dynamics.ofdm_isac import (
    OFDMConfig,
    Target,
    constellation,
    correct_cpe,
    correct_exactly,
    estimate,
    evm,
    sense,
)
from workbench.lib.dynamics.phase_noise import Pll, PoleZero, White, Wiener, increments, seen_density
from workbench.lib.dynamics.range_doppler import (
    MEASURES,
    Ratio,
    half_lobe,
    image_measures,
    main_lobe,
    range_doppler,
    stands_out,
    window,
)

SMALL = OFDMConfig(n_sub=32, n_sym=16, cp=8)
MIDDLE = OFDMConfig(n_sub=128, n_sym=64, cp=32)
PLL = Pll(1e-8, bandwidth=1e5, corner=1e3, floor=1e-12)
MASK = PoleZero(1e-8, zeros=(3e6,), poles=(1e5, 2e5))
NOISES = [Wiener(500.0), White(0.02), PLL, MASK]


def sensed(config, targets, noise, oscillators="independent", realisations=10, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return sense(config, targets, noise, oscillators, realisations=realisations, generator=generator, **options)


def cells(*shape):
    return draw(*shape).to(torch.complex128)


def image_of(frame, received=None):
    return range_doppler(estimate(frame.received if received is None else received, frame.sent))


def measures(frame, received=None, delay=5):
    clean = image_of(frame, frame.clean)
    return image_measures(image_of(frame, received), clean, frame.config.place([Target(delay)]))


@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("oscillators", ["shared", "independent"])
def test_common_error_and_interference_share_a_power_of_one(noise, oscillators):
    frame = sensed(SMALL, [Target(5), Target(2.5, 100.0, 0.1j)], noise, oscillators)
    power = frame.spectra.abs().square().sum(-1)
    torch.testing.assert_close(power, torch.ones_like(power), rtol=0, atol=1e-12)


def test_phase_noise_convolves_the_subcarriers():
    """Y_m[k] = sum_i Phi_m[i] (H X)_m[k - i], written out."""
    frame = sensed(SMALL, [Target(5)], Wiener(5e3), realisations=2)
    k = torch.arange(SMALL.n_sub)
    channel = torch.polar(torch.ones(SMALL.n_sub).double(), -2 * math.pi * 5 * k.double() / SMALL.n_sub)
    through, phi = channel * frame.sent, frame.spectra[:, 0]
    by_hand = sum(phi[..., i : i + 1] * through[..., (k - i) % SMALL.n_sub] for i in k)
    torch.testing.assert_close(frame.received, by_hand)
    torch.testing.assert_close(frame.clean, through)


@pytest.mark.parametrize("delay", [0, 3, 8])
def test_without_noise_a_resting_target_is_one_cell(delay):
    frame = sensed(SMALL, [Target(delay, gain=0.5j)], None, realisations=2)
    image = image_of(frame)
    alone = torch.zeros_like(image)
    alone[:, 0, delay] = 0.5j
    torch.testing.assert_close(image, alone, rtol=0, atol=1e-12)
    assert measures(frame, delay=delay)["pplr"].decibels == pytest.approx(0.0, abs=1e-12)


def test_a_delay_beyond_the_cyclic_prefix_is_no_pure_tone():
    image = image_of(sensed(SMALL, [Target(SMALL.cp + 3)], None))
    assert float(image.abs()[:, 0, SMALL.cp + 3].max()) < 0.999
    assert float((image.abs() > 1e-3).double().mean()) > 0.5


@pytest.mark.parametrize("delay", [2.5, 6.25])
def test_part_of_a_sample_is_a_turn_of_each_subcarrier(delay):
    frame = sensed(SMALL, [Target(delay)], None)
    k = torch.fft.fftfreq(SMALL.n_sub, 1 / SMALL.n_sub, dtype=torch.float64)
    turned = torch.polar(torch.ones_like(k), -2 * math.pi * delay / SMALL.n_sub * k)
    torch.testing.assert_close(estimate(frame.received, frame.sent), turned.expand_as(frame.sent))


def test_doppler_moves_the_peak_by_rows_and_leaks_as_foretold():
    config = OFDMConfig(n_sub=128, n_sym=64, cp=0)
    doppler = 4 * config.doppler_bin  # 1/16 of the spacing
    assert doppler == pytest.approx(config.df / 16)
    frame = sensed(config, [Target(0, doppler)], None, realisations=20)
    power = image_of(frame).abs().square()
    assert power[0].argmax() == 4 * config.n_sub
    peak, whole = power[:, 4, 0].mean(), power.sum((-2, -1)).mean()
    leaked = 1 - float(peak / whole)
    assert leaked == pytest.approx(expected.doppler_interference(doppler, config.df), rel=0.02)
    cells = 256 * 128
    floor = 10 * math.log10(cells / expected.doppler_interference(0.0625, 1.0))
    assert floor == pytest.approx(64.0, abs=0.1)


@pytest.mark.parametrize(("variance", "share"), [(0.01, 0.990), (0.1, 0.905), (0.5, 0.607)])
def test_white_phases_lower_the_peak_as_foretold(variance, share):
    frame = sensed(MIDDLE, [Target(5)], White(variance / 2))  # of two oscillators
    cells = MIDDLE.n_sub * MIDDLE.n_sym
    assert expected.white_peak(variance, cells) == pytest.approx(share, abs=1e-3)
    assert float(measures(frame)["pplr"].each.mean()) == pytest.approx(share, rel=0.01)
    structure = expected.seen_phase(MIDDLE, White(variance / 2), "independent", 5)
    assert float(expected.doppler_cut(MIDDLE, structure, 4)[0]) == pytest.approx(share, rel=2e-3)


@pytest.mark.parametrize(("linewidth", "fall"), [(20.0, -0.24), (200.0, -2.1)])
def test_the_peak_of_two_free_oscillators_in_closed_form(linewidth, fall):
    """The mean over all pairs of kept samples, here by a plain sum over some of them."""
    config = OFDMConfig()
    structure = expected.seen_phase(config, Wiener(linewidth), "independent", 16)
    peak = float(expected.doppler_cut(config, structure, 4)[0])
    assert 10 * math.log10(peak) == pytest.approx(fall, abs=0.03)
    times = torch.arange(config.length).view(config.n_sym, -1)[:, config.cp :: 16].flatten().double() / config.fs
    apart = (times[:, None] - times).abs()
    assert peak == pytest.approx(float((-math.pi * 2 * linewidth * apart).exp().mean()), rel=1e-3)


def test_the_peak_of_drawn_free_oscillators_is_the_closed_form():
    noise = Wiener(200.0)
    frame = sensed(MIDDLE, [Target(5)], noise, realisations=200)
    cut = expected.doppler_cut(MIDDLE, expected.seen_phase(MIDDLE, noise, "independent", 5), 4)
    found = measures(frame)["pplr"].each
    error = float(found.std()) / math.sqrt(len(found))
    assert float(found.mean()) == pytest.approx(float(cut[0]), abs=4 * error) and error < 0.02


@pytest.mark.parametrize("oscillators", ["shared", "independent"])
@pytest.mark.parametrize("noise", [Wiener(100.0), PLL, MASK], ids=str)
def test_the_cut_along_doppler_is_the_closed_form(noise, oscillators):
    frame = sensed(MIDDLE, [Target(20)], noise, oscillators, realisations=100)
    cut = image_of(frame).abs().square()[:, :, 20].mean(0)
    closed = expected.doppler_cut(MIDDLE, expected.seen_phase(MIDDLE, noise, oscillators, 20), 4)
    assert float((cut / closed).log10().abs().max()) * 10 < 2.5  # a hundred draws a cell
    assert 10 * math.log10(cut[1:].sum() / closed[1:].sum()) == pytest.approx(0.0, abs=0.8)


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_structures_are_those_of_the_draws(noise):
    fs, length = 1e6, 512
    theta = noise.draw(4000, length, fs, torch.Generator().manual_seed(0))
    lags = torch.tensor([0, 1, 7, 100, -7])
    structure = noise.structure(lags, fs, length)
    assert structure[0] == 0 and structure[2] == structure[4]
    for lag, of in zip(lags[1:4].tolist(), structure[1:4], strict=True):
        assert float((theta[:, 150] - theta[:, 150 + lag]).square().mean()) == pytest.approx(float(of), rel=0.1)


def test_one_free_oscillator_leaves_what_changed_within_the_delay():
    config, noise, delay = SMALL, Wiener(1e3), 8
    assert not sensed(config, [Target(0)], noise, "shared").phase.any()
    phase = sensed(config, [Target(delay)], noise, "shared", realisations=300).phase
    variance = 2 * math.pi * noise.linewidth * delay / config.fs
    assert float(phase.square().mean()) == pytest.approx(variance, rel=0.05)
    far = expected.seen_phase(config, noise, "shared", delay)(torch.tensor([delay, 50]))
    torch.testing.assert_close(far, torch.full((2,), 2 * variance, dtype=torch.float64))  # disjoint increments


def test_one_oscillator_is_a_comb_on_the_density_and_two_are_twice_it():
    fs, length, delay = 1e6, 4096, 8
    f = torch.fft.rfftfreq(length, 1 / fs, dtype=torch.float64)
    comb = seen_density(PLL.bins(length, fs), f, delay / fs)
    covariance = torch.fft.irfft(comb * fs, length)
    lags = torch.tensor([1, 5, 8, 20, 1000])
    structure = increments(PLL, fs, length, shared=True, delay=delay)(lags)
    torch.testing.assert_close(structure, 2 * (covariance[0] - covariance[lags]))
    theta = PLL.draw(3, length, fs, torch.Generator().manual_seed(0))
    phi = torch.fft.rfft(theta.roll(delay, -1) - theta).abs().square()
    torch.testing.assert_close(phi, seen_density(torch.fft.rfft(theta).abs().square(), f, delay / fs))
    flat, f = torch.ones(2).double(), torch.tensor([fs / 4 / delay, fs / 2 / delay]).double()
    assert seen_density(flat, f, None).tolist() == [2.0, 2.0]
    assert seen_density(flat, f, delay / fs).tolist() == pytest.approx([2.0, 4.0])  # as two, and 3 dB above them


@pytest.mark.parametrize(("order", "kappa", "db"), [(4, 1.0, 0.0), (16, 1.889, 2.76), (64, 2.685, 4.29)])
def test_what_is_left_after_exact_correction_is_the_closed_form(order, kappa, db):
    config, noise = OFDMConfig(n_sub=128, n_sym=64, cp=32, order=order), Wiener(200.0)
    assert expected.kappa(order) == pytest.approx(kappa, abs=1e-3)
    assert 10 * math.log10(expected.kappa(order)) == pytest.approx(db, abs=0.01)
    assert expected.kappa(order) == pytest.approx(float(constellation(order).abs().square().reciprocal().mean()))
    interference = expected.symbol_interference(config, expected.seen_phase(config, noise, "independent", 5))
    assert interference == pytest.approx(expected.wiener_interference(2 * 200.0, config.df), rel=0.01)
    frame = sensed(config, [Target(5)], noise, realisations=20)
    sir = -measures(frame, correct_exactly(frame))["isr"].decibels
    assert sir == pytest.approx(expected.residual_sir(config, interference, order), abs=0.4)


def test_a_phase_constant_in_each_symbol_smears_doppler_alone_and_is_turned_back():
    frame = sensed(SMALL, [Target(5)], None)
    angles = torch.randn(10, SMALL.n_sym, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    received = frame.clean * torch.polar(torch.ones_like(angles), angles)
    image = image_of(frame, received)
    torch.testing.assert_close(image / image[..., 5:6], image_of(frame, frame.clean)[:, :1].expand_as(image))
    found = measures(frame, received)
    assert found["islr_d"].decibels > -5 and found["islr_r"].decibels < -200 and found["pslr_r"].decibels < -200
    turned = image_of(frame, correct_cpe(received, frame.sent))
    first = torch.polar(torch.ones_like(angles), angles)[:, :1]
    torch.testing.assert_close(turned, image_of(frame, frame.clean) * first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"every": 4}])
def test_correction_brings_the_image_back(options):
    frame = sensed(MIDDLE, [Target(5)], Wiener(200.0))
    raw = measures(frame)
    fixed = measures(frame, correct_cpe(frame.received, frame.sent, **options))
    assert raw["pplr"].decibels < -0.3 and fixed["pplr"].decibels > -0.1
    assert raw["islr_d"].decibels - fixed["islr_d"].decibels > 25
    assert evm(frame).mean() > 2 * evm(frame, correct_exactly(frame)).mean()


def test_a_known_channel_serves_as_the_reference_and_leaves_no_turn():
    frame = sensed(SMALL, [Target(5)], None)
    turned = frame.clean * torch.polar(torch.tensor(1.0).double(), torch.tensor(0.7).double())
    channel = (frame.clean / frame.sent)[:, 0]
    torch.testing.assert_close(correct_cpe(turned, frame.sent, reference=channel), turned)
    assert float(evm(frame).max()) < 1e-12


def test_matched_filter_and_zero_forcing_are_one_for_points_of_one_power():
    frame = sensed(SMALL, [Target(5)], Wiener(1e3))
    torch.testing.assert_close(*(estimate(frame.received, frame.sent, kind) for kind in ("zero_forcing", "matched")))


@pytest.mark.parametrize(("name", "half"), [("rect", 1.0), ("hann", 2.0)])
def test_main_lobes_end_at_the_nulls_of_their_windows(name, half):
    assert half_lobe(name, 64) == pytest.approx(half, abs=0.02)
    assert 1.0 < half_lobe("chebyshev", 64) < 4.0
    assert float(window(name, 64).mean()) == pytest.approx(1.0)
    bins = main_lobe(0.0, half_lobe(name, 64), 64 * 4, 4).nonzero().flatten().tolist()
    assert len(bins) == round(8 * half) - 1 and 0 in bins


@pytest.mark.parametrize("pad", [1, 3])
@pytest.mark.parametrize("name", ["rect", "hann", "chebyshev"])
def test_windows_and_padding_keep_the_peak_and_its_place(name, pad):
    m, k = torch.arange(16).double(), torch.fft.fftfreq(32, 1 / 32, dtype=torch.float64)
    turns = 3 * m[:, None] / 16 - 5 * k / 32
    channel = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)[None]
    image = range_doppler(channel, name, name, pad)
    assert image.shape == (1, 16 * pad, 32 * pad)
    assert int(image.abs().argmax()) == 3 * pad * 32 * pad + 5 * pad
    low = image_measures(image, image, [(3.0, 5.0)], name, name, pad)
    assert low["pplr"].decibels == 0
    level = {"rect": -12.5 if pad > 1 else -100, "hann": -30, "chebyshev": -59.9}[name]
    assert low["pslr_r"].decibels < level and low["pslr_d"].decibels < level
    assert float(image[0, 3 * pad, 5 * pad].real) == pytest.approx(1.0)


def test_a_weak_target_is_seen_where_the_floor_is_low():
    config = SMALL
    targets = [Target(5), Target(5, 6 * config.doppler_bin, 0.05)]
    places = config.place(targets)
    frame = sensed(config, targets, None)
    assert stands_out(image_of(frame), places[1], places[:1], reach=4).all()
    noisy = sensed(config, targets, Wiener(3e4))
    assert stands_out(image_of(noisy), places[1], places[:1], reach=4).double().mean() < 0.5


def test_thermal_noise_is_of_its_power_and_the_same_with_and_without_phase_noise():
    loud = sensed(SMALL, [Target(5)], None, snr_db=10.0, realisations=50)
    torch.testing.assert_close(loud.received, loud.clean)
    assert float(evm(sensed(SMALL, [Target(0, gain=1)], None, snr_db=300.0)).max()) < 1e-12
    channel = torch.fft.fft(torch.zeros(SMALL.n_sub).double().index_fill_(0, torch.tensor([5]), 1.0))
    noise = (loud.received - channel * loud.sent).abs().square().mean()
    assert float(noise) == pytest.approx(0.1, rel=0.03)


def test_decibels_are_of_the_ratio_of_the_means():
    ratio = Ratio(torch.tensor([1.0, 3.0]).double(), torch.tensor([0.1, 0.3]).double())
    assert ratio.decibels == pytest.approx(10.0) and ratio.each.tolist() == pytest.approx([10.0, 10.0])
    assert Ratio(torch.zeros(2).double(), torch.ones(2).double()).decibels == pytest.approx(-3000)
    assert set(measures(sensed(SMALL, [Target(5)], White(0.1)))) == set(MEASURES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: OFDMConfig(n_sub=1), "n_sub is 1 but must be at least 2"),
        (lambda: OFDMConfig(n_sub=16, cp=17), "cp is 17 but must be at most n_sub, 16"),
        (lambda: OFDMConfig(df=0.0), "df is 0.0 but must be a finite number above 0"),
        (lambda: OFDMConfig(df=math.nan), "df is nan"),
        (lambda: OFDMConfig(order=8), "order 8 is unknown"),
        (lambda: Wiener(-1.0), "linewidth is -1.0 but must be a finite number, 0 or above"),
        (lambda: White(math.inf), "variance is inf"),
        (lambda: Pll(1e-9, bandwidth=0.0), "bandwidth is 0.0"),
        (lambda: PoleZero(1.0, (), (1.0, -2.0)), r"poles\[1\] is -2.0"),
        (lambda: sensed(SMALL, [], None), "targets is empty"),
        (lambda: sensed(SMALL, [Target(-1)], None), r"targets\[0\].delay is -1"),
        (lambda: sensed(SMALL, [Target(1), Target(10**6)], None), r"targets\[1\].delay is 1000000"),
        (lambda: sensed(SMALL, [Target(1, math.nan)], None), r"targets\[0\].doppler is nan"),
        (lambda: sensed(SMALL, [Target(1)], None, "mono"), "oscillators 'mono' is unknown"),
        (lambda: sensed(SMALL, [Target(1)], None, realisations=0), "realisations is 0"),
        (lambda: estimate(cells(1, 2, 2), cells(1, 2, 2), "lmmse"), "kind 'lmmse' is unknown"),
        (lambda: correct_cpe(cells(1, 2, 4), cells(1, 2, 4), every=5), "every is 5 but must be from 1 to the 4"),
        (lambda: window("kaiser", 8), "window 'kaiser' is unknown"),
        (lambda: range_doppler(cells(4, 4), pad=0), "pad is 0"),
        (lambda: image_measures(cells(1, 4, 4), cells(2, 4, 4), [(0.0, 0.0)]), r"reference has shape \(2, 4, 4\)"),
        (lambda: image_measures(cells(1, 4, 4), cells(1, 4, 4), []), "places is empty"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
