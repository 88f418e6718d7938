"""Digits in negative and out of order: the same images in the same splits, nothing of the base moves, room to adapt."""

import pytest
import torch

from workbench.beds import shifted_digits as bed
from workbench.errors import InputError


def test_the_new_task_is_the_old_one_in_negative_with_one_order_of_the_pixels():
    before, after = bed.plain_task(1).data.splits, bed.task(1).data.splits
    for split, (x, y) in before.items():
        shown, labels = after[split]
        assert torch.equal(labels, y) and shown.shape == x.shape
        assert torch.equal((1 - shown).flatten(1).sort().values, x.flatten(1).sort().values)
    columns = (1 - after["train"][0]).flatten(1).T, before["train"][0].flatten(1).T
    order = [[i for i, column in enumerate(columns[1]) if torch.equal(column, one)] for one in columns[0]]
    assert all(order) and order != [[i] for i in range(64)]


def test_fewer_images_are_the_first_and_are_refused_by_name():
    few = bed.task(0, images=100)
    assert torch.equal(few.data.splits["train"][0], bed.task(0).data.splits["train"][0][:100])
    assert few.manifest["digits"]["splits"]["train"] == 100
    assert len(few.data.splits["test"][0]) == len(bed.task(0).data.splits["test"][0])
    with pytest.raises(InputError, match="images is 0 but must be between 1 and the "):
        bed.task(0, images=0)


def test_only_the_adapter_on_the_twelve_block_linears_moves():
    before = bed.base(bed.SMOKE).state_dict()
    adapted, state = bed.adapt_and_train("lora", {"rank": 2}, bed.SMOKE, 0)
    assert len(adapted.layers) == 12 and state.step == bed.SMOKE["steps"]
    after = adapted.remove().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_base_knows_its_digits_and_an_adapter_has_room():
    plain, moved = bed.measure(bed.SMOKE | {"steps": 100})
    assert plain.reached > 0.9
    assert moved.trivial < 0.3 and moved.reached > moved.trivial + 0.2 and moved.best > 0.8
