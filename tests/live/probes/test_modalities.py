"""What is split by domain is split by modality too: loads, pairs, gradients; and padding counts in none of it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from workbench.lib.core.models import DecoderLM
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context
from workbench.lib.core.task import LanguageModelling
from workbench.lib.modality.moma import ModalityExpertFFN
from workbench.live.probes import find
from workbench.live.probes.conflict import ConflictProbe
from workbench.live.probes.routing import RoutingProbe
from workbench.live.store import Run
from workbench.live.watch import watch

D = 16
FIRST = 102  # letters from here on are of the second modality


class Modal(LanguageModelling):
    """Letters as two modalities; the last token of each row is padding."""

    modalities = ("low", "high")

    def loss(self, model, batch):
        nats, context = self._nats(model, batch)
        return nats.mean(), context

    def modality_loss(self, model, batch, modality):
        return self._nats(model, batch)[0][(batch.targets >= FIRST).long() == modality].mean()

    def _nats(self, model, batch):
        mask = torch.ones(batch.inputs.shape, dtype=torch.bool)
        mask[:, -1] = False
        domain = batch.domain.repeat_interleave(batch.inputs.shape[1])
        modality = (batch.inputs >= FIRST).long().flatten()
        context = Context(domain=domain, modality=modality, mask=mask.flatten())
        return F.cross_entropy(model(batch.inputs, context).transpose(1, 2), batch.targets, reduction="none"), context


@pytest.fixture
def modal(task) -> Modal:
    return Modal(task.data, task.seq_len)


@pytest.fixture
def stream_model() -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(256, D, 2, 2, lambda _: ModalityExpertFFN(D, 8, {"low": 3, "high": 2}), seq_len=8)


def test_loads_and_pairs_by_modality_are_those_of_its_tokens(modal, stream_model):
    blocks = find.blocks(stream_model)
    probe = RoutingProbe(stream_model, blocks, {"domain": 3, "modality": 2}, None)
    probe.arm(True)
    batch = modal.batch("train", 6, torch.Generator().manual_seed(1))
    with observing([stream_model.blocks[0].ffn]) as seen:
        modal.loss(stream_model, batch)
    (routing, context), *_ = seen[stream_model.blocks[0].ffn]
    _, tensors = probe.take(structure=True)
    chosen = routing.mask()
    for by, label, n in (("domain", context.domain, 3), ("modality", context.modality, 2)):
        load = np.stack([chosen[label == part].sum(0).numpy() for part in range(n)])
        np.testing.assert_array_equal(tensors[f"load_by_{by}/blocks.0.ffn"], load)
        pairs = np.stack([(chosen[label == part].T.int() @ chosen[label == part].int()).numpy() for part in range(n)])
        np.testing.assert_array_equal(tensors[f"coactivation_by_{by}/blocks.0.ffn"], pairs)
        np.testing.assert_array_equal(pairs.sum(0), tensors["coactivation/blocks.0.ffn"])
    by_modality = tensors["load_by_modality/blocks.0.ffn"]
    assert not by_modality[0, 3:].any() and not by_modality[1, :3].any() and by_modality.any(1).all()
    assert probe._train.meter.counts("blocks.0.ffn").tokens == 6 * 7  # padding is no token


def test_gradients_by_modality_are_those_of_its_own_loss(modal, stream_model):
    groups = find.groups(stream_model, find.blocks(stream_model))
    dense = find.matrices(stream_model, find.blocks(stream_model))
    found = ConflictProbe(stream_model, modal, groups, 3, dense).take(seed=5)
    generator, halves = torch.Generator().manual_seed(5), []
    for _ in range(2):
        rows = []
        for modality in range(2):
            stream_model.zero_grad()
            modal.modality_loss(stream_model.eval(), modal.batch("train", 3, generator), modality).backward()
            rows.append(
                {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stream_model.parameters()}
            )
        halves.append(rows)
    for group, members in groups.items():
        first, second = (
            torch.stack([torch.cat([row[p].flatten() for p in members]) for row in rows]).double() for rows in halves
        )
        expected = torch.stack([first @ first.T, second @ second.T, first @ second.T]).numpy()
        np.testing.assert_allclose(found[f"conflict_by_modality/{group}"], expected, rtol=1e-4, atol=1e-9)
        assert found[f"conflict/{group}"].shape == (3, 3, 3)
    for matrix in dense:
        values = found[f"gradients_by_modality/{matrix.name}"]
        mean = [matrix.pick((halves[0][m][matrix.parameter] + halves[1][m][matrix.parameter]) / 2) for m in range(2)]
        expected = torch.stack([torch.linalg.svdvals(one) for one in mean])
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6)
        assert found[f"gradients_by_domain/{matrix.name}"].shape == (3, min(matrix.shape))
    experts = found["gradients_by_modality/blocks.0.ffn.experts.0.gate"]  # of the first modality
    assert experts[0].any() and not np.allclose(experts[0], experts[1])


def test_a_watched_run_says_its_modalities(modal, stream_model, tmp_path):
    optimizer = torch.optim.SGD(stream_model.parameters(), lr=0.1)
    with watch(stream_model, tmp_path / "run", task=modal, cadence={"conflict": 1, "structure": 1}) as watched:
        assert "3 domains, 2 modalities" in watched.found
        loss, _ = modal.loss(stream_model, modal.batch("train", 4, torch.Generator().manual_seed(0)))
        loss.backward()
        optimizer.step()
        watched.step(loss=loss.item())
        watched.evaluation({})
    with Run(tmp_path / "run") as run:
        assert run.meta["model"]["modalities"] == ["low", "high"]
        assert {"load_by_modality", "coactivation_by_modality", "conflict_by_modality", "gradients_by_modality"} <= {
            name.split("/")[0] for name in run.names()
        }


def test_conflict_of_domains_and_of_modalities_is_recorded_in_turn(modal, stream_model, tmp_path):
    cadence = {"routing": 0, "structure": 0, "conflict": 2}
    with watch(stream_model, tmp_path / "run", task=modal, cadence=cadence) as watched:
        for _ in range(9):
            watched.step(loss=1.0)
    with Run(tmp_path / "run") as run:
        assert run.tensors("conflict/trunk")[0].tolist() == [0, 4, 8]
        assert run.tensors("conflict_by_modality/trunk")[0].tolist() == [0, 2, 6]
        spectra = {name.partition("/")[0] for name in run.names() if name.startswith("gradients")}
        assert spectra == {"gradients_by_domain", "gradients_by_modality"}
        matrix = next(iter(run.meta["model"]["matrices"]))
        assert run.tensors(f"gradients_by_modality/{matrix}")[0].tolist() == [0, 2, 6]
