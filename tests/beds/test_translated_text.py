"""Languages made of one text: what a row says can be undone by hand; shares, shards, and a pass over a split."""

import math

import pytest
import torch
from torch.nn import functional as F

from workbench.beds.translated_text import FIRST, LETTERS, MASK, ORDERS, SPACE, START, Translation, letters, reordered
from workbench.errors import InputError
from workbench.lib.core.denoising import IGNORED
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import Task
from workbench.lib.data.types import TextDomains

L = 16
WORDS = "The quick brown fox, whom 7 lazy dogs saw, jumps over THEM again and again. "


def texts(times: int = 60) -> TextDomains:
    raw = torch.tensor(list((WORDS * times).encode()), dtype=torch.uint8)
    return TextDomains("fox", ("fox",), {s: {"fox": raw} for s in ("train", "validation", "test")}, {"fox": {}})


def plain(row: list[int]) -> str:
    return "".join(" " if i == SPACE else "?" if i == MASK else chr(ord("a") + i) for i in row)


def read(task: Translation, row: list[int], language: int) -> str:
    """What a language says, with its letters turned back; its words stand where they stood."""
    back = {int(to): of for of, to in enumerate(task.maps[language].tolist())}
    return plain([i if i == MASK else back[i] for i in row])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bytes_become_letters_and_single_spaces():
    found = letters(torch.tensor(list(b"A-z[] 9\n`{b@"), dtype=torch.uint8))
    assert plain(found.tolist()) == "a z b "
    assert plain(letters(texts(1).splits["train"]["fox"]).tolist()).startswith(
        "the quick brown fox whom lazy dogs saw jum"
    )


def test_words_change_their_places_and_a_text_its_length_never():
    row = letters(torch.tensor(list(b"ab cde f gh "), dtype=torch.uint8)).tolist()
    assert plain(reordered(row, "same")) == "ab cde f gh "
    assert plain(reordered(row, "backwards")) == " gh f cde ab"
    assert plain(reordered(row, "swapped")) == "cde ab gh f "
    for order in set(ORDERS):
        assert sorted(reordered(row, order)) == sorted(row)


def test_a_row_is_a_text_in_one_language_and_the_same_in_another():
    task = Translation(texts(), L, denoising=0.0)
    assert isinstance(task, Task) and task.time == 2 * L + 2 and task.vocab == FIRST + 6
    batch = task.batch("train", 200, generator())
    source = batch.inputs[:, 1] - FIRST
    assert torch.equal(batch.inputs[:, 0] - FIRST, batch.domain) and not (source == batch.domain).any()
    assert (batch.inputs[:, L + 2] == START).all() and (batch.targets[:, : L + 2] == IGNORED).all()
    said = batch.targets[:, L + 2 :]
    assert torch.equal(batch.inputs[:, L + 3 :], said[:, :-1])
    whole = plain(task.text["train"].tolist())
    for row in range(200):
        a, b = int(source[row]), int(batch.domain[row])
        given, answer = read(task, batch.inputs[row, 2 : L + 2].tolist(), a), read(task, said[row].tolist(), b)
        if ORDERS[a] == ORDERS[b]:
            assert given == answer
        if ORDERS[b] == "backwards":
            answer = " ".join(reversed(answer.split(" ")))
        if ORDERS[b] != "swapped":
            assert answer in whole
        assert sorted(given) == sorted(answer)


def test_each_language_has_letters_of_its_own():
    task = Translation(texts(), L)
    assert len({tuple(m) for m in task.maps.tolist()}) == 6
    assert all(sorted(m) == list(range(LETTERS + 1)) and m[SPACE] == SPACE for m in task.maps.tolist())


def test_denoising_hides_three_in_ten_letters_of_one_language():
    task = Translation(texts(), L, denoising=1.0)
    batch = task.batch("train", 100, generator())
    assert torch.equal(batch.inputs[:, 1] - FIRST, batch.domain)
    hidden, said = batch.inputs[:, 2 : L + 2] == MASK, batch.targets[:, L + 2 :]
    assert (hidden.sum(1) == round(0.3 * L)).all()
    assert torch.equal(batch.inputs[:, 2 : L + 2][~hidden], said[~hidden])


def test_the_poor_are_drawn_by_the_fifth_root_of_what_they_have_and_from_it_alone():
    task = Translation(texts(), L, denoising=0.5)
    assert task.sizes.tolist() == [len(task.text["train"]) >> i for i in range(6)]
    batch = task.batch("train", 20_000, generator())
    expected = torch.tensor([2 ** (-i / 5) for i in range(6)])
    expected /= expected.sum()
    found = torch.bincount(batch.domain, minlength=6) / 20_000
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()
    assert float((batch.inputs[:, 1] - FIRST == batch.domain).double().mean()) == pytest.approx(0.5, abs=0.015)


def test_shards_share_out_the_text():
    raw = torch.randint(97, 123, (4000,), generator=generator(), dtype=torch.uint8)  # no window twice
    data = TextDomains("drawn", ("drawn",), {split: {"drawn": raw} for split in ("train", "validation", "test")}, {})
    whole = plain(letters(raw).tolist())
    for i in range(2):
        task = Translation(data, L, languages=2, denoising=1.0, shard=(i, 2))
        batch = task.batch("train", 300, generator(), domain=0)
        starts = [whole.index(read(task, row, 0)) for row in batch.targets[:, L + 2 :].tolist()]
        assert 2000 * i - L <= min(starts) and max(starts) <= 2000 * (i + 1)


def test_a_pass_translates_every_row_into_every_language_and_is_the_same_each_time():
    task = Translation(texts(), L)
    once, again = (list(task.batches("test", 50)) for _ in range(2))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(once, again, strict=True))
    rows = len(task.text["test"]) // L
    for into in range(6):
        mine = [batch for batch in once if int(batch.domain[0]) == into]
        source = torch.cat([batch.inputs[:, 1] - FIRST for batch in mine])
        assert len(source) == rows and (source != into).all()
        assert source.bincount(minlength=6).max() - source.bincount(minlength=6)[source.unique()].min() <= 1


def test_loss_and_metric_are_of_the_letters_that_are_said():
    task = Translation(texts(), L)
    torch.manual_seed(0)
    model = DecoderLM(task.vocab, 16, 1, 2, lambda layer: GLU(16, 16), task.time)
    batch = task.batch("validation", 7, generator())
    loss, context = task.loss(model, batch)
    logits = model(batch.inputs, context)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item(), rel=1e-5)
    assert (context.prefix == L + 2).all()
    found = task.evaluate(model, "validation", 1)
    first = [next(b for b in task.batches("validation", 64) if int(b.domain[0]) == i) for i in range(6)]
    with torch.no_grad():
        bits = [task.loss(model, b)[0].item() / math.log(2) for b in first]
    assert found["bits_per_letter"] == pytest.approx(sum(bits) / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"languages": 1}, "languages is 1"),
        ({"denoising": 1.5}, "denoising is 1.5"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\)"),
        ({"length": 4000}, "length is 4000 but the last language has"),
    ],
)
def test_what_is_no_task_is_refused(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        Translation(texts(), **({"length": L} | options))


def test_what_is_no_batch_is_refused():
    task = Translation(texts(), L)
    with pytest.raises(InputError, match="size is 0"):
        task.batch("train", 0, generator())
    with pytest.raises(InputError, match="domain is 6"):
        task.batch("train", 2, generator(), domain=6)
    with pytest.raises(InputError, match="split"):
        task.batch("tests", 2, generator())
