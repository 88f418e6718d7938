"""Control tasks: twins that begin alike and go apart, experts that earn, and batches without what is solved."""

import pytest
import torch

from workbench.beds import control_tasks as bed
from workbench.beds.control_tasks import ACTION, MADE, OBSERVED, SYSTEMS, TASKS, ControlTasks, T, WorldModel, sequences
from workbench.errors import InputError
from workbench.lib.core.experts import GLU
from workbench.lib.core.routing import Context

ROWS = {"train": 40, "validation": 8, "test": 16}


def drawn(name: str, rows: int = 50):
    return sequences(name, rows, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SYSTEMS)
def test_twins_begin_alike_and_the_experts_of_both_do_the_opposite(name):
    (x, y), (twin_x, twin_y) = drawn(name), drawn(f"{name} reversed")
    assert x.shape == (50, T, OBSERVED + ACTION) and y.shape == (50, T, OBSERVED + 1 + ACTION)
    assert torch.equal(x[:, 0, :OBSERVED], twin_x[:, 0, :OBSERVED])
    assert torch.equal(y[:, 0, -ACTION:], -twin_y[:, 0, -ACTION:]) and bool(y[:, 0, -ACTION:].any())


@pytest.mark.parametrize("name", TASKS)
def test_what_comes_next_is_what_is_seen_next(name):
    x, y = drawn(name)
    torch.testing.assert_close(x[:, 1:, :OBSERVED], y[:, :-1, :OBSERVED])
    assert bool((x[..., OBSERVED:].abs() <= 1).all()) and bool(torch.isfinite(y).all())


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_expert_earns_more_than_its_opposite(name):
    system = MADE[name]()
    earned = {}
    for sign in (1, -1):
        state, total = system.start(200, torch.Generator().manual_seed(0)), 0.0
        for _ in range(60):
            state, reward = system.step(state, sign * system.expert(state))
            total += float(reward.mean())
        earned[sign] = total / 60
    assert earned[1] > earned[-1] + 0.5, earned


def test_the_same_step_of_twins_differs_by_the_action_alone():
    system = MADE["integrator"]()
    state = system.start(5, torch.Generator().manual_seed(0))
    action = torch.rand(5, ACTION)
    one, _ = system.step(state, action)
    other, _ = system.step(state, -action)
    torch.testing.assert_close((one - other)[:, 1], 2 * 0.3 * action[:, 0])


def test_solved_tasks_are_not_drawn_and_the_others_are_drawn_as_before():
    task, generator = ControlTasks(0, ROWS), torch.Generator()
    whole = task.batch("train", 24, generator.manual_seed(0))
    assert whole.domain.tolist() == [t for t in range(6) for _ in range(4)]
    task.active = (1, 4)
    part = task.batch("train", 24, generator.manual_seed(0))
    assert part.domain.tolist() == [1] * 4 + [4] * 4
    assert task.batch("train", 3, generator, 0).domain.tolist() == [0] * 3  # for who asks for it
    with pytest.raises(InputError, match="size is 5 but must be at least 6"):
        task.batch("train", 5, generator)
    with pytest.raises(InputError, match="fold is -1"):
        ControlTasks(-1)


def test_a_fold_is_its_own_data_and_the_same_again():
    one, same, other = (ControlTasks(fold, ROWS) for fold in (0, 0, 1))
    assert one.manifest == same.manifest != other.manifest
    assert torch.equal(one.splits["test"]["walk"][0], same.splits["test"]["walk"][0])


def model_of() -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(16, 2, 2, lambda layer: GLU(16, 24))


def test_the_loss_of_a_row_is_what_is_written_and_what_is_predicted_has_no_gradient():
    task, model = ControlTasks(0, ROWS), model_of()
    batch = task.batch("test", 6, torch.Generator().manual_seed(0), 2)
    context = Context(domain=batch.domain)
    rows = model(batch.inputs, batch.targets, context)
    seen, action = batch.inputs.split((OBSERVED, ACTION), -1)
    hidden = model.transformer(model.encoder(seen), action, Context())
    head = model.heads.weight[2].view(3, 16)
    latent = (model.next_latent(hidden[:, :, 1]) - model.encoder(batch.targets[..., :OBSERVED])).square().mean((1, 2))
    reward = (hidden[:, :, 1] @ head[0] - batch.targets[..., OBSERVED]).square().mean(1)
    best = (hidden[:, :, 0] @ head[1:].T - batch.targets[..., -ACTION:]).square().mean((1, 2))
    torch.testing.assert_close(rows, latent + reward + best)
    changed = batch.targets.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(batch.inputs, changed, context).sum(), changed)
    assert not gradient[..., :OBSERVED].any() and gradient[..., OBSERVED:].any()


def test_a_world_model_looks_at_the_past_alone():
    model = model_of().eval()
    x, _ = drawn("walk", 2)
    hidden = []
    for inputs in (x, torch.cat([x[:, :9], -x[:, 9:]], 1)):
        seen, action = inputs.split((OBSERVED, ACTION), -1)
        hidden.append(model.transformer(model.encoder(seen), action, Context()))
    torch.testing.assert_close(hidden[0][:, :9], hidden[1][:, :9])
    assert not torch.allclose(hidden[0][:, 9:], hidden[1][:, 9:])


def test_a_perceptron_on_one_step_is_better_than_the_mean_and_not_perfect():
    (row,) = bed.measure({"steps": 150, "batch": 48})
    assert 0.05 * row.trivial < row.reached < 0.5 * row.trivial
