"""All-to-all in three forms on real processes: the same bits both ways, and the messages of the formula."""

import pytest
import torch

from tests.lib.serving import ranks
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.serving.all_to_all import all_to_all_seconds, messages

P, NODE, TP, ROWS = 8, 4, 2, 3
BLOCK = ROWS * ranks.D * 8  # bytes


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_processes(ranks.exchanged, P, NODE, TP, ROWS)


def test_all_forms_give_the_same_bits_forwards_and_backwards(found: list[dict]):
    for rank, forms in enumerate(found):
        sent = [ranks.drawn(source // TP, P, ROWS, ranks.D)[rank] for source in range(P)]
        assert torch.equal(forms["flat"]["came"], torch.stack(sent))
        assert torch.equal(forms["hierarchical"]["came"], torch.stack(sent))
        assert torch.equal(forms["coordinated"]["came"], torch.stack(sent[::TP]))  # the copies once
        for form in ("hierarchical", "coordinated"):
            assert torch.equal(forms[form]["y"], forms["flat"]["y"]), form
            assert torch.equal(forms[form]["grad"], forms["flat"]["grad"]), form
        x, grad = (ranks.drawn(seed + rank // TP, P, ROWS, ranks.D) for seed in (0, 100))
        owner = torch.arange(1, P + 1, dtype=torch.float64)[:, None, None]
        assert torch.equal(forms["flat"]["y"], torch.sin(x) * owner)
        torch.testing.assert_close(forms["flat"]["grad"], grad * torch.cos(x) * owner)
        assert forms["own"]


def test_the_messages_of_a_rank_are_those_of_the_formula(found: list[dict]):
    """7 flat, 3 + 1 hierarchical, 3 coordinated and one all-gather of two ranks on the way back; backwards as many."""
    for forms in found:
        assert forms["flat"]["there"] == forms["flat"]["back"] == {"all_to_all": (7, 7 * BLOCK)}
        steps = {"all_to_all": (3 + 1, 3 * 2 * BLOCK + 4 * BLOCK)}
        assert forms["hierarchical"]["there"] == forms["hierarchical"]["back"] == steps
        assert forms["coordinated"]["there"] == {"all_to_all": (3, 3 * BLOCK)}
        assert forms["coordinated"]["back"] == {"all_to_all": (3, 3 * BLOCK), "all_gather": (1, 4 * BLOCK)}
        assert forms["coordinated"]["again"] == {"all_to_all": (6, 6 * BLOCK), "all_gather": (1, 4 * BLOCK)}
        for form, size in (("flat", 1), ("hierarchical", NODE), ("coordinated", TP)):
            for way, back in (("there", False), ("back", True)):
                assert sum(n for n, _ in forms[form][way].values()) == messages(form, P, size, back)


def test_messages_at_the_paper_s_scale():
    assert messages("flat", 128) == 127
    assert messages("hierarchical", 128, 8) == 7 + 15
    assert messages("coordinated", 128, 8) == 15 and messages("coordinated", 128, 8, back=True) == 15 + 7
    for form in ("flat", "hierarchical", "coordinated"):
        assert messages(form, 1) == 0
        assert messages(form, 8, 1) == 7


def test_seconds_are_a_line_for_every_message():
    near, far = LinkModel(1.0, 0.5), LinkModel(10.0, 2.0)

    def seconds(form: str, size: int, **more) -> float:
        return all_to_all_seconds(form, 4.0, 8, size, near, far, **more)

    assert seconds("flat", 1) == 7 * (10 + 2 * 4)
    assert seconds("flat", 1, node=4) == 3 * (1 + 0.5 * 4) + 4 * (10 + 2 * 4)
    assert seconds("hierarchical", 4, node=4) == 3 * (1 + 0.5 * 2 * 4) + (10 + 2 * 4 * 4)
    assert seconds("coordinated", 2, node=4) == 1 * (1 + 0.5 * 4) + 2 * (10 + 2 * 4)
    assert seconds("coordinated", 2, node=4, back=True) == seconds("coordinated", 2, node=4) + (1 + 0.5 * 4 * 4)
    assert seconds("flat", 1, shared=True) == 7 * (10 + 2 * 4 * 8)
    # with latency alone the hierarchy pays, with volume alone it costs twice
    slow, thin = LinkModel(1.0, 0.0), LinkModel(0.0, 1.0)
    assert all_to_all_seconds("hierarchical", 1.0, 64, 8, slow, slow) == 14 < 63
    assert all_to_all_seconds("hierarchical", 1.0, 64, 8, thin, thin) == 2 * 7 * 8 > 63


@pytest.mark.parametrize(
    ("given", "said"),
    [(("flatt", 8, 1), "form 'flatt' is unknown; did you mean 'flat'"), (("hierarchical", 8, 3), "size is 3 but must")],
)
def test_a_form_or_groups_that_do_not_fit_are_refused(given: tuple, said: str):
    with pytest.raises(InputError, match=said):
        messages(*given)
