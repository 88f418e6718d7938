"""What other libraries make of given models: run by a Python that has them.

    python peers.py PEER IN OUT        # safetensors in, safetensors out

Nothing of the workbench is imported. IN has, for every case, tensors "case/base/NAME", "case/I/NAME" and, where it is
wanted, "case/mask/I/NAME", "case/fisher/I/NAME", "case/gram/I/NAME", "case/weights" and "case/density"; OUT has
"case/call/NAME".
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


class Case:
    """The models of one case, as state dicts."""

    def __init__(self, tensors: State):
        self.base = self.part(tensors, "base")
        self.experts = [self.part(tensors, f"{i}") for i in range(9) if f"{i}/a" in tensors]
        self.masks = [self.part(tensors, f"mask/{i}") for i in range(len(self.experts))]
        self.fishers = [self.part(tensors, f"fisher/{i}") for i in range(len(self.experts))]
        self.grams = [self.part(tensors, f"gram/{i}") for i in range(len(self.experts))]
        self.weights, self.density = tensors["weights"], float(tensors["density"])

    @staticmethod
    def part(tensors: State, head: str) -> State:
        return {name.removeprefix(f"{head}/"): x for name, x in tensors.items() if name.startswith(f"{head}/")}

    def tau(self, name: str) -> list[Tensor]:
        return [expert[name] - self.base[name] for expert in self.experts]

    def draws(self, name: str) -> Iterator[Tensor]:
        return iter([mask[name] for mask in self.masks])

    def each(self, merge) -> State:
        """Tensor by tensor: base + merge(name, task vectors)."""
        return {name: self.base[name] + merge(name, self.tau(name)) for name in self.base}


def peft(case: Case) -> dict[str, State]:
    from peft.utils import merge_utils

    weights, density = case.weights, case.density

    def dare(function):
        def merge(name: str, tau: list[Tensor]) -> Tensor:
            draws = case.draws(name)
            with patch("torch.bernoulli", lambda _: next(draws)):
                return function(tau, weights, density)

        return case.each(merge)

    return {
        "task_arithmetic": case.each(lambda _, tau: merge_utils.task_arithmetic(tau, weights)),
        "magnitude_prune": case.each(lambda _, tau: merge_utils.magnitude_prune(tau, weights, density)),
        "ties": case.each(lambda _, tau: merge_utils.ties(tau, weights, density)),
        "ties, frequency": case.each(lambda _, tau: merge_utils.ties(tau, weights, density, "frequency")),
        "dare_linear": dare(merge_utils.dare_linear),
        "dare_ties": dare(merge_utils.dare_ties),
    }


def mergekit(case: Case) -> dict[str, State]:
    from mergekit.merge_methods.base import TensorBatch, TensorGroup
    from mergekit.merge_methods.registry import get

    ids = range(1, len(case.experts) + 1)

    def group(method: str) -> State:
        made, n = {}, {"weight": case.weights.tolist(), "density": [case.density] * len(ids)}
        for name in case.base:
            models = TensorGroup.from_tensors([case.base[name], *(e[name] for e in case.experts)], base_index=0)
            own = {p.name: dict(zip(ids, n[p.name], strict=True)) for p in get(method).spec.parameters if p.name in n}
            own |= {p.name: p.default for p in get(method).spec.parameters if p.name not in n}
            draws = case.draws(name)
            with patch("torch.bernoulli", lambda _, draws=draws: next(draws)):
                made[name] = get(method).merge_group(models, **own)
        return made

    def linear() -> State:
        return {
            name: get("linear").merge_batch(
                TensorBatch([e[name][None] for e in case.experts]), weight=case.weights[None]
            )[0]
            for name in case.base
        }

    return {"linear": linear()} | {n: group(n) for n in ("task_arithmetic", "ties", "dare_linear", "dare_ties")}


def fusion_bench(case: Case) -> dict[str, State]:
    def function(module: str, name: str):
        return getattr(importlib.import_module(f"fusion_bench.method.{module}"), name)

    flat = torch.stack(
        [torch.cat([delta.flatten() for delta in row]) for row in zip(*map(case.tau, case.base), strict=True)]
    )
    sizes = [x.numel() for x in case.base.values()]
    rows = {name: [expert[name] for expert in case.experts] for name in case.base}

    def model(state: State) -> torch.nn.Module:
        made = torch.nn.Module()
        for name, value in state.items():
            made.register_buffer(name, value.clone())  # as a parameter, it raises a TypeError
        return made

    def ties(how: str) -> State:
        merged = function("ties_merging.ties_merging_utils", "ties_merging")(flat, case.density, how).split(sizes)
        return {name: base + x.view_as(base) for (name, base), x in zip(case.base.items(), merged, strict=True)}

    def dare(name: str, tau: list[Tensor]) -> Tensor:
        draws, dropped = case.draws(name), [delta.clone() for delta in tau]
        with patch("torch.rand_like", lambda _: next(draws)):
            for delta in dropped:
                function("dare.utils", "param_random_drop_")(delta, 1 - case.density, True)
        return sum(dropped)

    def sums() -> State:
        merge = function("task_arithmetic.task_arithmetic", "task_arithmetic_merge")
        return merge(model(case.base), [model(expert) for expert in case.experts], 1.0, inplace=False).state_dict()

    def regmean() -> State:
        merge = function("regmean.regmean", "merging_with_regmean_weights")
        made = merge({f"{name}.weight": x for name, x in rows.items()}, case.grams, 0.7)
        return {name.removesuffix(".weight"): x for name, x in made.items()}

    def tsv_m() -> State:
        merge = function("task_singular_vector.utils.TSVM_utils", "compute_and_sum_svd_mem_reduction")
        made = merge([{name: case.tau(name)[i] for name in case.base} for i in range(len(case.experts))], "cpu")
        return {name: case.base[name] + x for name, x in made.items()}

    made = {
        "simple_average": function("simple_average", "simple_average")(case.experts),
        "task_arithmetic_merge": sums(),
        "ties_merging, mean": ties("mean"),
        "ties_merging, sum": ties("sum"),
        "param_random_drop_": case.each(dare),
    }
    if case.grams[0]:
        fisher = function("fisher_merging.fisher_merging", "merging_with_fisher_weights")
        made["merging_with_fisher_weights"] = fisher(rows, case.fishers, case.weights, True, 1e-6)
        made["merging_with_regmean_weights"] = regmean()
        made["compute_and_sum_svd_mem_reduction"] = tsv_m()
    return made


def run(peer: str, tensors: State) -> State:
    """All calls of a peer on all cases."""
    made = {}
    for name in sorted({key.partition("/")[0] for key in tensors}):
        with contextlib.redirect_stdout(io.StringIO()):
            found = {"peft": peft, "mergekit": mergekit, "fusion_bench": fusion_bench}[peer](
                Case(Case.part(tensors, name))
            )
        made |= {
            f"{name}/{call}/{key}": x.detach().contiguous().clone()
            for call, out in found.items()
            for key, x in out.items()
        }
    return made


if __name__ == "__main__":
    save_file(run(sys.argv[1], load_file(sys.argv[2])), sys.argv[3])
