"""D2MoE's simulator beside its executor: planes really read through a token bucket, experts really computed.

Calibrated are reads of each size and an expert at each level and number of tokens, each while the other is at work.
Nothing of the traces that are then served has a part in it.
"""

import tempfile
from pathlib import Path

import torch

from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.core.simulation.validation import Validation, machine
from workbench.lib.serving.d2moe import by_rank
from workbench.lib.serving.d2moe_code import NestedQuantizer
from workbench.lib.serving.d2moe_executor import D2Executor, NestedBank
from workbench.lib.serving.d2moe_schedule import D2Sim

LAYERS, EXPERTS, REQUESTS = 2, 8, 8
BANDWIDTH = 100e6  # bytes/s, of a slow flash memory
CONFIGURATIONS = (
    ("hebf", 0.25),
    ("hebf", 0.5),
    ("fifo", 0.25),
    ("johnson", 0.25),
    ("whole", 0.5),
    ("progressive", 0.25),
)
"""Policy, and the part of the bytes of all experts in 8 bits that the budget is."""


def measure(quick: bool = False) -> Validation:
    width, hidden, steps = (64, 64, 2) if quick else (256, 512, 16)
    draw = torch.Generator().manual_seed(0)

    def bank() -> NestedBank:
        quantizer = NestedQuantizer(refit=False)  # which values scales have takes no time
        shapes = ((EXPERTS, 2 * hidden, width), (EXPERTS, width, hidden))
        return NestedBank(*(quantizer.fit(torch.randn(*shape, generator=draw) / shape[-1] ** 0.5) for shape in shapes))

    banks, rows = [bank() for _ in range(LAYERS)], []
    shape = {"prompts": REQUESTS, "prompt": 0, "generated": steps, "layers": LAYERS, "experts": EXPERTS, "top_k": 2}
    with tempfile.TemporaryDirectory() as folder:
        executor = D2Executor(banks, Path(folder) / "experts.planes", BANDWIDTH)
        costs = executor.calibrate(tokens=(1, 2, 4, 8), basis=machine()["cpu"])
        for at, (policy, share) in enumerate(CONFIGURATIONS):
            trace = by_rank(zipf_markov(seed=at, **shape), (2, 4))
            budget = int(share * LAYERS * EXPERTS * costs.sizes[8])
            ran = executor.run(trace, costs, policy, budget).served
            said = D2Sim(trace, costs, policy, budget).run()
            rows.append(
                {"configuration": f"{policy}, {share:.0%} of memory", "predicted": said.seconds}
                | {"measured": ran.seconds, "bubbles_predicted": said.bubbles, "bubbles_measured": ran.bubbles}
                | {"bits_predicted": said.bits_used, "bits_measured": ran.bits_used, "peak_bytes": ran.peak_bytes}
            )
        del executor  # its file is mapped
    shape |= {"bandwidth": BANDWIDTH, "d_model": width, "d_hidden": hidden}
    return Validation.made("d2moe", {"costs": costs.to_dict(), "shape": shape}, rows, "s")
