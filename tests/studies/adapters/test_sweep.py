"""The sweep of what is adapted."""

from workbench.beds import shifted_digits as bed
from workbench.studies.adapters.sweep import swept_row


def test_a_row_counts_all_its_trainings():
    def train(rate):
        return bed.adapt_and_train("lora", {"rank": 2}, bed.SMOKE | {"steps": 2}, 0, rate)

    row = swept_row("lora", 0, train, (1e-3, 1e-2, 1e-1))
    assert row.steps == 6 and row.flops % 6 == 0 and row.extra["trained"] == 12 * 2 * 192
    assert len(row.extra["test"]) == 3 and 0 <= row.metric <= 1
