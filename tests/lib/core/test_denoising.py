"""Text with holes: T5's counts, nothing lost on the way there and back, and batches of the two forms."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from workbench.errors import InputError
from workbench.lib.core.denoising import (
    BYTES,
    IGNORED,
    EncoderDecoderForm,
    Example,
    PrefixForm,
    Vocabulary,
    blank_out,
    cut_off,
    longest_text,
    random_span_mask,
    reconstruct,
    span_counts,
)

rates = st.floats(0.01, 0.99)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (length,), generator=seeded(seed))


def runs(mask: torch.Tensor) -> int:
    return int(mask[0]) + int((mask[1:] & ~mask[:-1]).sum())


# -- which tokens are hidden


@given(st.integers(2, 600), st.floats(1, 100), rates, st.integers(0, 1000))
def test_the_counts_of_a_mask_are_exact(length: int, mean_span: float, rate: float, seed: int):
    mean_span = min(mean_span, length)
    mask = random_span_mask(length, mean_span, rate, seeded(seed))
    hidden = min(max(round(rate * length), 1), length - 1)
    assert mask.dtype == torch.bool and mask.shape == (length,)
    assert int(mask.sum()) == hidden
    assert runs(mask) == min(max(round(hidden / mean_span), 1), length - hidden)
    assert not mask[0] and mask[-1]


@pytest.mark.parametrize(
    ("length", "mean_span", "rate", "expected"),
    [
        (568, 3, 0.15, (85, 28)),  # T5's own pre-training: 512 tokens given and 114 said
        (512, 3, 0.15, (77, 26)),
        (10, 3, 0.15, (2, 1)),  # 1.5 is rounded to even
        (30, 3, 0.15, (4, 1)),  # and 4.5
        (2, 1, 0.01, (1, 1)),
        (2, 1, 0.99, (1, 1)),
        (10, 1, 0.9, (9, 1)),  # nine spans had no eight tokens to part them
        (100, 64, 0.5, (50, 1)),
    ],
)
def test_counts_that_are_known(length: int, mean_span: float, rate: float, expected: tuple[int, int]):
    assert span_counts(length, mean_span, rate) == expected


def test_every_way_to_part_the_tokens_comes_as_often_as_each_other():
    """Seven tokens, four hidden in two spans: 3 ways to part the four times 2 for the three others."""
    generator = seeded()
    drawn = Counter(tuple(random_span_mask(7, 2, 0.5, generator).tolist()) for _ in range(3000))
    assert len(drawn) == math.comb(3, 1) * math.comb(2, 1)
    assert chisquare(list(drawn.values())).pvalue > 1e-3


@pytest.mark.parametrize(("mean_span", "rate"), [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)])
def test_the_mean_span_of_a_long_text_is_the_one_asked_for(mean_span: float, rate: float):
    hidden, spans = span_counts(20_000, mean_span, rate)
    assert hidden / spans == pytest.approx(mean_span, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1, 1, 0.5), "length is 1 but must be at least 2"),
        ((8, 3, 0.0), "rate is 0.0 but must be above 0 and below 1"),
        ((8, 3, 1.0), "rate is 1.0 but"),
        ((8, 3, math.nan), "rate is nan but"),
        ((8, 9, 0.5), "mean_span is 9 but must be at least 1 and at most the 8 tokens"),
        ((8, 0.5, 0.5), "mean_span is 0.5 but"),
    ],
)
def test_masks_that_cannot_be_are_refused(arguments: tuple, said: str):
    with pytest.raises(InputError, match=said):
        random_span_mask(*arguments, seeded())


# -- examples


@given(st.integers(2, 300), st.floats(1, 20), rates, st.integers(0, 1000))
def test_what_was_hidden_is_put_back(length: int, mean_span: float, rate: float, seed: int):
    vocab, ids = Vocabulary(sentinels=300), text(length, seed)
    mask = random_span_mask(length, min(mean_span, length), rate, seeded(seed))
    example = blank_out(ids, mask, vocab)
    assert torch.equal(reconstruct(example.given, example.said, vocab), ids)
    hidden, spans = int(mask.sum()), runs(mask)
    assert len(example.given) == length - hidden + spans  # no token is lost, and none is there twice
    assert len(example.said) == hidden + spans + 1
    sentinels = torch.arange(256, 256 + spans)
    for part in (example.given, example.said):
        assert torch.equal(part[vocab.is_sentinel(part)], sentinels)
    count = 1 + seed % (length - 1)
    rest = cut_off(ids, count)
    assert torch.equal(reconstruct(rest.given, rest.said), ids) and len(rest.said) == count and rest.goes_on


@given(st.lists(st.booleans(), min_size=2, max_size=20).filter(lambda mask: 0 < sum(mask) < len(mask)))
def test_any_mask_can_be_blanked_out(mask: list[bool]):
    """Also one that begins with a hole, which no drawn mask does."""
    ids = text(len(mask))
    example = blank_out(ids, torch.tensor(mask))
    assert torch.equal(reconstruct(example.given, example.said), ids)


def test_an_example_by_hand():
    mask = torch.tensor([False, False, True, True, False, True, False])
    example = blank_out(torch.arange(7), mask)
    assert example.given.tolist() == [0, 1, 256, 4, 257, 6]
    assert example.said.tolist() == [256, 2, 3, 257, 5, BYTES.end] and not example.goes_on


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ([1, 256], [False, True], "ids are 1 to 256 but must be between 0 and 255"),
        ([-1, 2], [False, True], "ids are -1 to 2 but"),
        ([1], [True], "must be one text of at least 2 tokens"),
        ([1, 2], [False, False], "mask hides 0 of 2 tokens"),
        ([1, 2], [True, True], "mask hides 2 of 2 tokens"),
        ([1, 2, 3, 4], [False, True, False, True], "mask has 2 spans but the vocabulary has 1 sentinels"),
    ],
)
def test_examples_that_cannot_be_are_refused(ids: list, mask: list, said: str):
    with pytest.raises(InputError, match=said):
        blank_out(torch.tensor(ids), torch.tensor(mask), Vocabulary(sentinels=1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_text_is_hidden_as_it_is_kept_in_bytes(dtype: torch.dtype):
    ids, mask = torch.arange(100, 107), torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool()
    for make in (lambda ids: blank_out(ids, mask), lambda ids: cut_off(ids, 2)):
        kept, wide = make(ids.to(dtype)), make(ids)
        assert torch.equal(kept.given, wide.given) and torch.equal(kept.said, wide.said)
        assert kept.given.dtype == kept.said.dtype == torch.int64
        assert torch.equal(reconstruct(kept.given, kept.said), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_are_whole_numbers(dtype: torch.dtype):
    with pytest.raises(InputError, match=f"ids are {dtype} but must be whole numbers"):
        cut_off(torch.ones(4, dtype=dtype), 1)


@pytest.mark.parametrize("count", [0, 4, 5, -1])
def test_an_end_that_is_no_part_of_the_text_is_refused(count: int):
    with pytest.raises(InputError, match=f"count is {count} but must be between 1 and 3"):
        cut_off(text(4), count)


@pytest.mark.parametrize(
    ("given", "said", "message"),
    [
        ([1, 256], [257, 2, BYTES.end], "the same sentinels"),
        ([1, 256], [2, 256, BYTES.end], "the same sentinels"),
        ([1, 256, 3, 257], [256, 2, BYTES.end], "the same sentinels"),
        ([1, 2], [256, 2, BYTES.end], "the same sentinels"),
        ([1, 256], [256, 2], "must end with END"),
        ([1, 256], [256, 2, BYTES.end, 3, BYTES.end], f"said holds {BYTES.end} but must hold data and sentinels"),
        ([BYTES.pad, 256], [256, 2, BYTES.end], f"given holds {BYTES.pad}"),
        ([1, 2], [3, BYTES.end], f"said holds {BYTES.end}"),
        ([1, BYTES.mode("R")], [3], f"given holds {BYTES.mode('R')}"),
    ],
)
def test_what_was_said_wrongly_is_not_put_together(given: list, said: list, message: str):
    with pytest.raises(InputError, match=message):
        reconstruct(torch.tensor(given), torch.tensor(said))


def test_a_vocabulary_has_no_id_twice():
    vocab = Vocabulary(10, 4, ("A", "B"))
    ids = [*range(10), *range(10, 14), vocab.start, vocab.end, vocab.pad, vocab.mode("A"), vocab.mode("B")]
    assert ids == list(range(vocab.size))
    assert [vocab.written(i) for i in ids[9:]] == [
        "\t",
        "<0>",
        "<1>",
        "<2>",
        "<3>",
        "START",
        "END",
        "PAD",
        "[A]",
        "[B]",
    ]
    with pytest.raises(InputError, match="mode 'C' is unknown"):
        vocab.mode("C")
    for wrong in ({"data": 0}, {"sentinels": -1}):
        with pytest.raises(InputError, match="must be a whole number, at least 1"):
            Vocabulary(**wrong)
    with pytest.raises(InputError, match=r"modes are .* but must each be another"):
        Vocabulary(modes=("R", "R"))
    for token in (-1, vocab.size):
        with pytest.raises(InputError, match=f"token is {token} but must be between 0 and {vocab.size - 1}"):
            vocab.written(token)


# -- batches


EXAMPLES = [
    Example(torch.tensor([5, 6, 256]), torch.tensor([256, 7, BYTES.end]), False),
    Example(torch.tensor([5, 6]), torch.tensor([7, 8, 9]), True),
]
START, END, PAD, R, S = BYTES.start, BYTES.end, BYTES.pad, BYTES.mode("R"), BYTES.mode("S")
_ = IGNORED


def test_a_batch_for_an_encoder_and_a_decoder():
    batch = EncoderDecoderForm(5, 4).collate(EXAMPLES, [R, S], BYTES)
    assert batch["encoder_ids"].tolist() == [[R, 5, 6, 256, PAD], [S, 5, 6, PAD, PAD]]
    assert batch["encoder_mask"].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch["decoder_ids"].tolist() == [[START, 256, 7, PAD], [START, 7, 8, PAD]]
    assert batch["labels"].tolist() == [[256, 7, END, _], [7, 8, 9, _]]


def test_a_batch_for_a_decoder():
    batch = PrefixForm(8).collate(EXAMPLES, [R, S], BYTES)
    assert batch["tokens"].tolist() == [[R, 5, 6, 256, START, 256, 7, PAD], [S, 5, 6, 7, 8, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[_, _, _, _, 256, 7, END, _], [_, _, 7, 8, 9, _, _, _]]
    assert batch["prefix"].tolist() == [5, 3]
    seen = batch["attention_mask"][:, 0]
    assert seen[0, 0].tolist() == [True] * 5 + [False] * 3 and seen[0, 5].tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("form", "modes", "said"),
    [
        (EncoderDecoderForm(2, 9), None, r"examples\[0\] has 3 tokens but .* has room for 2"),
        (EncoderDecoderForm(3, 9), [R, S], r"examples\[0\] has 4 tokens but .* has room for 3"),
        (EncoderDecoderForm(9, 2), None, r"examples\[0\] has 3 tokens but .* has room for 2"),
        (PrefixForm(5), None, r"examples\[0\] has 6 tokens but .* has room for 5"),
        (PrefixForm(6), [R, S], r"examples\[0\] has 7 tokens but .* has room for 6"),
        (PrefixForm(20), [R], "modes has 1 tokens but must have one for each of 2 examples"),
        (EncoderDecoderForm(9, 9), [R, S, S], "modes has 3 tokens but must have one for each of 2 examples"),
    ],
)
def test_a_batch_that_has_no_room_or_too_few_modes_is_refused(form, modes, said: str):
    with pytest.raises(InputError, match=said):
        form.collate(EXAMPLES, modes, BYTES)


def test_without_modes_a_batch_is_the_same_but_for_the_first_token():
    with_modes, without = (PrefixForm(8).collate(EXAMPLES, modes, BYTES) for modes in ([R, S], None))
    for name in ("tokens", "labels"):
        assert torch.equal(with_modes[name][:, 1:], without[name][:, :-1])
    assert torch.equal(with_modes["prefix"], without["prefix"] + 1)


def test_transformers_takes_both_forms():
    """Its T5 shifts our labels to our decoder's ids, and its decoder under our mask reads what is given both ways."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    batch = EncoderDecoderForm(5, 4).collate(EXAMPLES, [R, S], BYTES)
    tokens = {"vocab_size": BYTES.size, "pad_token_id": PAD, "decoder_start_token_id": START, "eos_token_id": END}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **tokens)
    ).eval()
    ids = {"input_ids": batch["encoder_ids"], "attention_mask": batch["encoder_mask"]}
    by_labels = t5(**ids, labels=batch["labels"])
    by_ids = t5(**ids, decoder_input_ids=batch["decoder_ids"])
    said = batch["labels"] != IGNORED
    torch.testing.assert_close(by_labels.logits[said], by_ids.logits[said])

    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=BYTES.size
        )
    ).eval()
    batch = PrefixForm(8).collate(EXAMPLES, [R, S], BYTES)
    mask = torch.where(batch["attention_mask"], 0.0, torch.finfo(torch.float32).min)
    logits = llama(batch["tokens"], attention_mask=mask).logits
    changed = batch["tokens"].clone()
    changed[0, 6] = 9  # said: what comes before it does not change
    after = llama(changed, attention_mask=mask).logits
    torch.testing.assert_close(after[0, :6], logits[0, :6])
    changed = batch["tokens"].clone()
    changed[0, 3] = 9  # given: all that is given changes, also before it
    assert ((llama(changed, attention_mask=mask).logits - logits)[0, :5].abs().amax(-1) > 1e-6).all()


# -- how long a text may be


def t5_sizes(length: int) -> list[tuple[int, int]]:
    hidden, spans = span_counts(length, 3, 0.15)
    return [(length - hidden + spans, hidden + spans + 1)]


def test_t5s_own_text_is_568_tokens_long():
    """512 and 114 are published; in place of the END that T5 gives, there is room for a mode."""
    assert longest_text(EncoderDecoderForm(512, 114), t5_sizes, False, 3) == 568
    assert t5_sizes(568) == [(511, 114)]
    assert longest_text(EncoderDecoderForm(512, 113), t5_sizes, False, 3) < 568


@settings(max_examples=20)
@given(st.integers(12, 80), st.integers(12, 80))
def test_the_longest_text_is_the_last_that_fits(given_room: int, said_room: int):
    for form in (EncoderDecoderForm(given_room, said_room), PrefixForm(given_room)):
        length = longest_text(form, t5_sizes, False, 3)
        fits = [all(form.fits(*sizes, False) for sizes in t5_sizes(n)) for n in range(3, length + 4)]
        assert fits == [True] * (length - 2) + [False] * 3


def test_where_there_is_no_room_there_is_no_text():
    with pytest.raises(InputError, match="has no room for a text of 3 tokens"):
        longest_text(PrefixForm(4), t5_sizes, False, 3)
