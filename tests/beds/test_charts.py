"""Charts: scripts are read as they were written, and a model learns to write one."""

import pytest
import torch

from workbench.beds import charts as bed
from workbench.beds.chart_to_code import LONGEST, ChartToCode
from workbench.errors import InputError
from workbench.lib.charts import LANGUAGES, render, sample_specs
from workbench.lib.core.train import TrainConfig, train

CHARTS = 96


@pytest.mark.parametrize("view", bed.VIEWS)
def test_parts_joined_are_the_script_again(view):
    for spec in sample_specs(200, seed=8):
        ids = bed.encode(bed.written(spec, view), view)
        assert ids[0] == bed.START[view] and ids[-1] == bed.END and bed.UNKNOWN not in ids
        assert len(ids) <= LONGEST
        assert bed.decode(ids[1:]) == bed.decode([*ids[1:], 9, 9]) == bed.written(spec, view)


def test_reads_what_is_written_freely():
    specs = sample_specs(3, seed=8)
    for language in LANGUAGES:
        scripts = [render(spec, language) for spec in specs]
        assert bed.read([*scripts, "", scripts[0][:-4]], language) == [*specs, None, None]
    found = bed.measures({name: [(specs[0], specs[0]), (specs[1], None)] for name in LANGUAGES})
    assert found["mean_f1"] == 0.5 and found["executes"]["r"] == found["value_f1"]["latex"] == 0.5


def test_generation_is_greedy_decoding_of_the_forward():
    torch.manual_seed(0)
    task, model = bed.ChartScripts(CHARTS), ChartToCode()
    images, language = task.data.images[:3], torch.tensor([0, 1, 2])
    tokens = torch.tensor([[bed.START[name]] for name in LANGUAGES])
    written = model.generate(images, tokens[:, 0], language)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, model(images, tokens, language)[:, -1:].argmax(-1)], 1)
    for row, expected in zip(written.tolist(), tokens[:, 1:].tolist(), strict=True):
        n = min(len(row), 12, expected.index(bed.END) + 1 if bed.END in expected else 12)
        assert row[:n] == expected[:n]
        assert set(row[row.index(bed.END) + 1 :]) <= {bed.PAD} if bed.END in row else True
    assert written.shape[1] <= LONGEST


def test_learns_one_chart_by_heart():
    torch.manual_seed(0)
    task, model = bed.ChartScripts(CHARTS, ("python",), train_charts=1), ChartToCode()
    train(model, task, TrainConfig(60, 3, lr=1e-2, weight_decay=0.0))
    ids = model.generate(task.data.images[:1], torch.tensor([bed.START["python"]]), torch.tensor([0]))
    assert bed.decode(ids[0].tolist()) == task.data.scripts(0)["python"]
    truth = task.data.specs[0]
    assert bed.read([bed.decode(ids[0].tolist())], "python") == [truth]


def test_the_data_is_aligned_or_in_one_language_each_and_wrong_input_is_named():
    task = bed.ChartScripts(CHARTS)
    batch = task.batch("train", 9, torch.Generator().manual_seed(0))
    assert batch.domain.bincount().tolist() == [3, 3, 3] and batch.inputs.shape == (9, 3, 64, 64)
    loose = bed.ChartScripts(CHARTS, aligned=False)
    pairs = {}
    for seed in range(30):
        one = loose.batch("train", 9, torch.Generator().manual_seed(seed))
        for image, view in zip(one.inputs, one.domain.tolist(), strict=True):
            pairs.setdefault(image.numpy().tobytes(), set()).add(view)
    assert max(map(len, pairs.values())) == 1  # each chart in one language
    held_out = torch.cat([b.inputs for b in task.batches("validation", 7)])
    assert held_out.shape[0] == 3 * 40
    with pytest.raises(InputError, match="view 'pyton' is unknown"):
        bed.ChartScripts(CHARTS, ("pyton",))
    with pytest.raises(InputError, match="train_charts is 99"):
        bed.ChartScripts(CHARTS, train_charts=99)
    with pytest.raises(InputError, match="split 'test' is unknown"):
        task.batch("test", 3, torch.Generator())
    with pytest.raises(InputError, match="size is 0"):
        task.batch("train", 0, torch.Generator())
