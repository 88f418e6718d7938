"""UL2's denoisers: the seven settings of the paper, one for each row, nothing cut off, and their limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.denoising import (
    BYTES,
    IGNORED,
    EncoderDecoderForm,
    PrefixForm,
    Vocabulary,
    reconstruct,
    span_counts,
)
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context
from workbench.lib.data_mixtures.ul2 import (
    CAUSAL,
    PREFIX_LM,
    SPAN_PLUS_LM,
    T5_ONLY,
    UL2_PAPER,
    UL2R,
    DenoiserSpec,
    MixtureOfDenoisers,
    corrupt,
    scaled,
)

LENGTH = 96
FORMS = (PrefixForm(LENGTH), EncoderDecoderForm(80, 48))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(mixture: MixtureOfDenoisers, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (size, mixture.raw_length), generator=seeded(seed))


def paper(form=FORMS[0], **options) -> MixtureOfDenoisers:
    return MixtureOfDenoisers(scaled(UL2_PAPER, LENGTH), form, **options)


# -- one denoiser


def test_the_seven_settings_are_those_of_the_paper():
    assert [(s.mode, s.mean_span, s.rate, s.weight) for s in UL2_PAPER] == [
        ("R", 3, 0.15, 1),
        ("R", 8, 0.15, 1),
        ("S", None, 0.25, 1),
        ("X", 3, 0.5, 1),
        ("X", 8, 0.5, 1),
        ("X", 64, 0.15, 1),
        ("X", 64, 0.5, 1),
    ]
    shares = {mode: sum(s.weight for s in UL2R if s.mode == mode) for mode in "RSX"}
    assert shares == {"R": 0.25, "S": 0.5, "X": 0.25}


@pytest.mark.parametrize("spec", [*UL2_PAPER, *CAUSAL, *UL2R[-1:]], ids=lambda spec: spec.name)
def test_nothing_is_lost_at_any_length(spec: DenoiserSpec):
    """More than a thousand texts over all denoisers, the shortest that there are among them for each."""
    vocab, generator = Vocabulary(sentinels=200), seeded()
    lengths = [*range(2, 9), *torch.randint(2, 500, (120,), generator=generator).tolist()]
    for length in lengths:
        (found,) = scaled([spec], length)
        ids = torch.randint(256, (length,), generator=generator)
        example = corrupt(ids, found, generator, vocab)
        assert torch.equal(reconstruct(example.given, example.said, vocab), ids)
        if spec.goes_on:
            assert len(example.given) + len(example.said) == length and example.goes_on
        else:
            assert [(len(example.given), len(example.said))] == found.sizes(length)


@given(st.integers(2, 400), st.floats(0.01, 0.99))
def test_an_end_has_every_length_around_the_mean_alike(length: int, rate: float):
    least, most = DenoiserSpec("S", rate).ends(length)
    assert 1 <= least <= most <= length - 1
    if 2 <= 2 * rate * length <= 2 * length - 2:
        assert (least + most) / 2 == pytest.approx(rate * length, abs=0.25)
    assert least == 1 or most == length - 1  # as wide as it can be


def test_ends_are_drawn_uniformly():
    spec, generator, ids = DenoiserSpec("S", 0.25), seeded(), torch.arange(40)
    drawn = torch.tensor([len(corrupt(ids, spec, generator).said) for _ in range(2000)])
    assert spec.ends(40) == (1, 19)
    assert chisquare(drawn.bincount(minlength=20)[1:]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Q", 0.5, 3), "mode 'Q' is unknown"),
        (("R", 0, 3), "rate is 0 but must be above 0 and below 1"),
        (("R", 1, 3), "rate is 1 but"),
        (("R", 0.5, 0.5), "mean_span is 0.5 but must be at least 1"),
        (("R", None, 3), "mean_span is 3 but .* needs a rate"),
        (("R", 0.5, math.inf), "mean_span is inf but"),
        (("R", 0.5, 3, -1), "weight is -1 but must be finite and not negative"),
        (("R", 0.5, 3, math.nan), "weight is nan but"),
    ],
)
def test_denoisers_that_cannot_be_are_refused(arguments: tuple, said: str):
    with pytest.raises(InputError, match=said):
        DenoiserSpec(*arguments)


def test_a_span_longer_than_the_text_is_refused_and_not_made_shorter_in_silence():
    spec = UL2_PAPER[-1]
    with pytest.raises(InputError, match="mean_span is 64 but must be at least 1 and at most the 20 tokens"):
        corrupt(torch.arange(20), spec, seeded())
    with pytest.raises(InputError, match="has no room for a text of 64 tokens"):
        MixtureOfDenoisers([spec], PrefixForm(48))
    assert [s.mean_span for s in scaled([spec, *CAUSAL], 100)] == [25, None]
    with pytest.raises(InputError, match="length is 1 but"):
        corrupt(torch.arange(1), DenoiserSpec("R", 0.15, 1), seeded())
    with pytest.raises(InputError, match="length is 1 but"):
        corrupt(torch.arange(1), *PREFIX_LM, seeded())


# -- the mixture


@pytest.mark.parametrize("form", FORMS, ids=["prefix", "encoder-decoder"])
def test_nothing_is_cut_off_and_rows_are_as_full_as_they_can_be(form):
    """Of every denoiser the whole of what it says has labels, and one token more would not have fitted."""
    mixture = paper(form)
    assert mixture.raw_length == max(mixture.lengths)
    for index, (spec, length) in enumerate(zip(mixture.specs, mixture.lengths, strict=True)):
        batch = mixture(rows(mixture), seeded(), torch.full((8,), index))
        said = (batch["labels"] != IGNORED).sum(1)
        if spec.goes_on:
            least, most = spec.ends(length)
            assert least <= said.min() and said.max() <= most
        else:
            hidden, spans = span_counts(length, spec.mean_span, spec.rate)
            assert (said == hidden + spans + 1).all()
        assert not all(form.fits(*sizes, spec.goes_on) for sizes in spec.sizes(length + 1))
    t5 = MixtureOfDenoisers(T5_ONLY, EncoderDecoderForm(512, 114))
    assert t5.lengths == (568,)


def test_the_text_is_in_the_batch():
    """Of each row of either form: what is given and said, put together, is the beginning of the row."""
    for form in FORMS:
        mixture = paper(form)
        text = rows(mixture, 64)
        batch = mixture(text, seeded())
        for i, index in enumerate(batch["spec_id"].tolist()):
            labels = batch["labels"][i]
            said = labels[labels != IGNORED]
            if "prefix" in batch:
                start = 0 if mixture.specs[index].goes_on else 1
                given_ = batch["tokens"][i, 1 : batch["prefix"][i] - start]
                first = batch["tokens"][i, 0]
            else:
                first, *rest = batch["encoder_ids"][i][batch["encoder_mask"][i]]
                given_ = torch.stack(rest)
            assert int(first) == BYTES.mode(mixture.specs[index].mode)
            assert torch.equal(reconstruct(given_, said), text[i, : mixture.lengths[index]])


def test_denoisers_come_as_often_as_their_weights_say():
    specs = [DenoiserSpec("R", 0.15, 3, 0.5), DenoiserSpec("S", 0.25, None, 2), DenoiserSpec("X", 0.5, 8, 0)]
    mixture = MixtureOfDenoisers(specs, FORMS[0])
    assert mixture.shares.tolist() == [0.2, 0.8, 0]
    drawn = mixture.draw(4000, seeded()).bincount(minlength=3)
    assert drawn[2] == 0 and chisquare(drawn[:2], [800, 3200]).pvalue > 1e-3
    uniform = paper().draw(7000, seeded()).bincount(minlength=7)
    assert chisquare(uniform).pvalue > 1e-3


def test_the_mean_of_what_is_said_is_the_one_that_is_named():
    for specs in (UL2_PAPER, CAUSAL, SPAN_PLUS_LM, PREFIX_LM):
        mixture = MixtureOfDenoisers(scaled(specs, LENGTH), FORMS[0])
        counts = (
            (mixture(rows(mixture, 400 if specs == UL2_PAPER else 100), seeded())["labels"] != IGNORED).sum(1).double()
        )
        error = float(counts.std()) / math.sqrt(len(counts))
        assert float(counts.mean()) == pytest.approx(mixture.said, abs=4 * error + 1e-9)


def test_modes_change_nothing_but_the_first_token():
    made = [paper(mode_tokens=modes) for modes in (True, False)]
    assert made[0].lengths == made[1].lengths
    with_modes, without = (mixture(rows(mixture), seeded()) for mixture in made)
    assert torch.equal(with_modes["spec_id"], without["spec_id"])
    for name in ("tokens", "labels"):
        assert torch.equal(with_modes[name][:, 1:], without[name][:, :-1])
    modes = [BYTES.mode(made[0].specs[i].mode) for i in with_modes["spec_id"].tolist()]
    assert with_modes["tokens"][:, 0].tolist() == modes


def test_one_seed_gives_the_same_batch():
    mixture = paper()
    one, same, other = (mixture(rows(mixture), seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["tokens"], other["tokens"])


def model() -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(BYTES.size, 16, 2, 2, lambda layer: GLU(16, 16), LENGTH).double()


def nats(batch: dict) -> torch.Tensor:
    logits = model()(batch["tokens"], Context(prefix=batch["prefix"]))
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")


def test_all_but_the_first_token_is_a_causal_language_model():
    mixture = MixtureOfDenoisers(CAUSAL, PrefixForm(LENGTH), mode_tokens=False)
    text = rows(mixture)
    assert text.shape[1] == LENGTH  # a token less than without room for a mode
    found = nats(mixture(text, seeded())).sum() / (len(text) * (LENGTH - 1))
    expected = F.cross_entropy(model()(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_loss_is_the_mean_of_the_denoisers_losses_by_what_they_say():
    mixture = paper()
    batch = mixture(rows(mixture, 32), seeded())
    costs, said = nats(batch), batch["labels"] != IGNORED
    total = costs.sum() / said.sum()
    parts = [batch["spec_id"] == i for i in batch["spec_id"].unique()]
    each = torch.stack([costs[part].sum() / said[part].sum() for part in parts])
    shares = torch.stack([said[part].sum() / said.sum() for part in parts])
    assert len(parts) > 3
    torch.testing.assert_close(total, (each * shares).sum())


def test_no_padding_and_nothing_given_has_a_label():
    mixture = paper()
    batch = mixture(rows(mixture, 64), seeded())
    place = torch.arange(LENGTH)
    assert (batch["labels"][place < batch["prefix"][:, None] - 1] == IGNORED).all()
    assert (batch["labels"][batch["tokens"] == BYTES.pad] == IGNORED).all()


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ((), "specs have the weights"),
        ((DenoiserSpec("R", 0.5, 3, 0),), "specs have the weights"),
        ((DenoiserSpec("R", 0.5, 3), DenoiserSpec("R", 0.5, 3, 2)), "must each be another"),
        ((DenoiserSpec("X", 0.5, 1),), "vocab has 32 sentinels but X 1 50% makes"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(specs: tuple, said: str):
    with pytest.raises(InputError, match=said):
        MixtureOfDenoisers(specs, PrefixForm(200))


def test_rows_that_do_not_fit_are_refused():
    mixture = paper()
    text = rows(mixture)
    with pytest.raises(InputError, match="at least raw_length = 96"):
        mixture(text[:, :-1], seeded())
    with pytest.raises(InputError, match="at least raw_length = 96"):
        mixture(text[:0], seeded())
    with pytest.raises(InputError, match="ids above are sentinels"):
        mixture(text + 200, seeded())
    for wrong in (torch.full((8,), 7), torch.full((8,), -1), torch.full((8,), 0.5), torch.zeros(8, dtype=torch.bool)):
        with pytest.raises(InputError, match="must be one of 7 denoisers for each row"):
            mixture(text, seeded(), wrong)


def test_a_mode_that_the_vocabulary_has_not_is_refused_at_once():
    vocab = Vocabulary(modes=("R",))
    with pytest.raises(InputError, match="mode 'S' is unknown"):
        MixtureOfDenoisers(PREFIX_LM, PrefixForm(32), vocab)
    assert MixtureOfDenoisers(PREFIX_LM, PrefixForm(32), vocab, mode_tokens=False).raw_length == 32


@pytest.mark.parametrize("length", [0, 1])
def test_denoisers_are_scaled_to_texts_that_there_are(length: int):
    with pytest.raises(InputError, match=f"length is {length} but must be at least 2"):
        scaled(UL2_PAPER, length)


def test_text_in_bytes_makes_the_same_batch():
    mixture = paper()
    text = rows(mixture)
    wide, narrow = (mixture(one, seeded()) for one in (text, text.to(torch.uint8)))
    assert all(torch.equal(wide[name], narrow[name]) and wide[name].dtype == narrow[name].dtype for name in wide)
