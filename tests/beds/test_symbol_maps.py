"""Tasks that conflict: what a row says, which strings are whose; the base is frozen, and an arm the same each time."""

import pytest
import torch

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SPLITS, SymbolMaps
from workbench.errors import InputError
from workbench.studies.rows import adapted_row


def draw(task: SymbolMaps, split: str = "train", size: int = 200, **options):
    return task.batch(split, size, torch.Generator().manual_seed(0), **options)


def test_a_row_is_the_task_the_string_and_its_rotated_and_mapped_symbols():
    task = SymbolMaps([2, 3], 5, length=4, maps=[0, 1, 2, 0, 1], rotations=[0, 0, 1, 3, 2])
    batch = draw(task)
    assert batch.inputs.shape == (200, 9) and batch.targets.shape == (200, 4)
    for row, answer, domain in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.domain.tolist(), strict=True):
        number = (2, 3)[domain]
        string = row[1:5]
        turned = [string[(i + task.rotations[number]) % 4] for i in range(4)]
        assert answer == [int(task.maps[number][symbol]) for symbol in turned]
        assert row[0] == 11 + number and row[5] == 10 and row[6:] == answer[:-1]
    assert torch.equal(task.maps[0], task.maps[3]) and not torch.equal(task.maps[0], task.maps[1])
    assert all(sorted(row) == list(range(10)) for row in task.maps.tolist())


def test_the_maps_depend_on_the_seed_alone_and_strings_on_the_split_alone():
    few, many = SymbolMaps([1], 8), SymbolMaps(range(8), 8)
    assert torch.equal(few.maps, many.maps) and not torch.equal(few.maps, SymbolMaps([1], 8, seed=1).maps)
    strings = {split: {tuple(row[1:7]) for row in draw(few, split, 400).inputs.tolist()} for split in SPLITS}
    assert not strings["train"] & strings["validation"] and not strings["validation"] & strings["test"]
    held_out = [tuple(row[1:7]) for batch in few.batches("validation", 50) for row in batch.inputs.tolist()]
    assert len(held_out) == 256 and not set(held_out) & strings["train"]
    assert set(draw(many, domain=3).domain.tolist()) == {3}


def test_the_metric_is_the_share_of_right_symbols_of_each_task():
    task = SymbolMaps([0, 1], 2, length=3)

    class Knows(torch.nn.Module):
        """The map of task 0, for both."""

        def forward(self, tokens, context):
            answers = task.maps[0][tokens[:, 1:4]]
            logits = torch.zeros(*tokens.shape, task.vocab)
            logits[:, -3:] = torch.nn.functional.one_hot(answers, task.vocab) * 20.0
            return logits

    found = task.evaluate(Knows())
    same = float((task.maps[0] == task.maps[1])[next(task.batches("validation", 256)).inputs[:, 1:4]].double().mean())
    assert found["accuracy/task 0"] == 1.0 and found["accuracy/task 1"] == pytest.approx(same)
    assert found["accuracy"] == pytest.approx((1 + same) / 2)
    assert task.loss(Knows(), draw(task, domain=0))[0] < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SymbolMaps([], 3), "tasks is"),
        (lambda: SymbolMaps([3], 3), "tasks is"),
        (lambda: SymbolMaps([0], 3, length=0), "length is 0 but must be at least 1"),
        (lambda: SymbolMaps([0], 3, held_out=0), "held_out is 0 but must be at least 1"),
        (lambda: SymbolMaps([0], 3, maps=[0, 1]), "maps and rotations have 2 and 3 entries but must have 3"),
        (lambda: draw(SymbolMaps([0], 1), "tran"), "split 'tran' is unknown; did you mean 'train'"),
        (lambda: draw(SymbolMaps([0], 1), size=0), "size is 0 but must be at least 1"),
        (lambda: next(SymbolMaps([0], 1).batches("train", 8)), "split 'train' is unknown"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.study
def test_an_arm_trains_its_adapters_on_the_new_maps_alone_and_the_same_each_time():
    base = {name: value.clone() for name, value in bed.base(bed.SMOKE).state_dict().items()}
    rows = []
    for _ in range(2):
        adapted, state = bed.adapt_and_train("lora", {"rank": 2}, bed.SMOKE, seed=3)
        state.metrics = state.task.evaluate(adapted.model)
        rows.append(adapted_row("lora", 3, adapted, state))
        assert all(torch.equal(value, base[name]) for name, value in adapted.remove().state_dict().items())
    assert rows[0] == rows[1]
    row = rows[0]
    assert row.steps == 4 and row.flops > 0 and len(row.extra["by_task"]) == bed.NEW
    assert row.extra["trained"] == 2 * 2 * (48 + 192 + 96 + 48) and row.extra["worst"] == min(row.extra["by_task"])
