"""Workbench: mixture-of-experts, low-rank adaptation, model merging and subspace methods, to run, compare and watch.

    import workbench

    workbench.methods()                                   # the catalogue: seventy published systems
    workbench.method("rmoe")                              # one of them: what it is, how to build it, where to read on
    print(workbench.study("rmoe", preset="smoke"))        # its paper's claim as a comparison with a verdict
    workbench.results()                                   # the verdicts that travel with the package

    adapted = workbench.adapt(model, "lora", rank=8)      # adapters on the linear layers of any model
    adapted.save("folder")                                # and later: workbench.load_adapter(model, "folder")
    merged = workbench.merge(base, [a, b], "ties")        # one model of several that came from one base
    with workbench.watch(model, "my-run") as watched:     # in a training script of your own, for the live views
        ...
        watched.step(loss=loss.item())                    # after optimizer.step()

68 of the 70 stand today: dynamoe, equifinality, rmoe, sigma-moe-tiny (routing); mixture-of-recursions, shallow-again,
stable-rps, unipool, widenet (sharing); cdsp-moe, scalezero (subspaces); charluma, dynamic-dino, flexmore, llava-mole,
lora-mixer, mhr, mixlora, mole-diffusion, remix, smora (lora_experts); intrinsic-dimension, lora-variants, mos-shards,
mosa, nola (adapters); lost, maestro, muon-pp, svd-free-dct, welore (low_rank); concrete-subspace, lora-lego,
pcb-merging, rmm, sub-moe (merging); mixture-of-mamba, moe-redundancy, moma, uni-moe (modality); moa, moba (attention);
climb, linear-dmo, ul2 (data_mixtures); frontier, hecate, parallel-folding, streaming-diloco, z-code-m3 (distributed);
d2moe, deepspeed-moe, hybrimoe, moe-lens (serving); dcn-v2, unified-embedding (features); ascan, bossnas, fsap, neas,
wavemix (search); molr-mog, multi-output-deblur, semi-parametric, tunable-conv (imaging); mixer, ofdm-isac (dynamics);
sonicmoe (kernels). The others are planned.

Importing this package is light: torch, panel and the rest are imported by the names that need them.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> where it lives. Nothing of it is imported before it is asked for.
_LAZY = {
    "methods": "workbench.catalogue:methods",
    "method": "workbench.catalogue:method",
    "study": "workbench.studies.core:run_study",
    "results": "workbench.studies.stored:results",
    "result": "workbench.studies.core:load_result",
    "train": "workbench.lib.core.train:train",
    "adapt": "workbench.lib.core.adapt:adapt",
    "load_adapter": "workbench.lib.core.adapt:load_adapter",
    "merge": "workbench.lib.core.merge:merge",
    "load_factored": "workbench.lib.core.factored_files:load_factored",
    "watch": "workbench.live.watch:watch",
    "WatchCallback": "workbench.live.trainer_callback:WatchCallback",
    "runs": "workbench.live.store:runs",
    "find_run": "workbench.live.store:find",
    "home": "workbench.paths:home",
    "InputError": "workbench.errors:InputError",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
