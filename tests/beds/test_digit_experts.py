"""Experts of one base: no image leaks between splits, each expert knows its task, and averaging costs something."""

import pytest
import torch

from workbench.beds import digit_experts
from workbench.beds.digit_experts import SMOKE, TASKS, average, base, expert, task
from workbench.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def mnist(fetched):
    fetched("mnist-5k")


def test_a_task_shows_the_same_images_in_the_same_split():
    plain, mirrored = task("plain"), task("mirrored")
    for split, (x, y) in plain.data.splits.items():
        assert torch.equal(mirrored.data.splits[split][0].flip(3), x)
        assert torch.equal(mirrored.data.splits[split][1], y)
    inks = {name: task(name).data.splits["train"][0] for name in TASKS}
    for name, x in inks.items():
        assert x.shape[1:] == (1, 28, 28) and x.min() >= 0 and x.max() <= 1
        assert name in ("scanned", "mirrored") or not torch.equal(x, plain.data.splits["train"][0])
    x = plain.data.splits["train"][0][:8]
    torch.testing.assert_close(digit_experts.turned(x, 90), torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-4)
    assert torch.equal(inks["turned left"][:8], digit_experts.turned(x, 30))
    assert torch.equal(inks["turned right"][:8], digit_experts.turned(x, -30))


def test_every_expert_is_good_at_its_task_and_their_average_is_not():
    rows = digit_experts.measure(SMOKE)
    assert [row.case for row in rows] == list(TASKS)
    for row in rows:
        assert 0.75 < row.best < 0.97 and row.best > row.trivial + 0.1
    mean = {name: sum(getattr(row, name) for row in rows) / len(rows) for name in ("trivial", "reached", "best")}
    assert mean["trivial"] + 0.03 < mean["reached"] < mean["best"] - 0.2


def test_the_head_stays_and_the_kept_weights_are_those_that_were_trained(empty_home, monkeypatch):
    tiny = SMOKE | {"width": 8, "base_steps": 3, "expert_steps": 3}
    with pytest.raises(InputError, match="workbench data get mnist-5k"):
        base(tiny)
    monkeypatch.undo()
    start, trained = base(tiny), expert("edges", tiny)
    assert all(torch.equal(a, b) for a, b in zip(start.head.parameters(), trained.head.parameters(), strict=True))
    assert not torch.equal(start.blocks[0][1].weight, trained.blocks[0][1].weight)
    monkeypatch.setattr(digit_experts, "train", None)  # whatever is trained from now on fails
    again = expert("edges", tiny)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))
    with pytest.raises(TypeError):
        expert("edges", tiny, seed=1)


def test_an_average_is_the_mean_of_each_weight():
    models = [digit_experts.DigitNet(4) for _ in range(3)]
    merged = average(models)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, sum(model.state_dict()[key] for model in models) / 3)
    assert merged is not models[0]


def test_an_unknown_task_is_named():
    with pytest.raises(InputError, match="task 'edge' is unknown; did you mean 'edges'"):
        task("edge")
