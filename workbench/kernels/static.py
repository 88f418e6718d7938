"""What can be known of a Triton kernel without a GPU: it compiles, and the compiler says what it will need.

    python -m workbench.kernels.static                      # the table
    python -m workbench.kernels.static --write SNAPSHOT     # the snapshot that a test compares with

Every `<operator>/triton.py` lists the configurations to compile as `launches()`. Widths and strides are run-time
arguments of the kernels, so that one compilation serves several shapes of a model. Times are not known here.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.errors import InputError, unknown

OPERATORS = (
    "moe_mlp",
    "gather_sum",
    "topk_softmax",
    "route_metadata",
    "block_sparse_attention",
    "span_attention",
    "low_rank",
    "random_basis",
    "trim_elect_merge",
    "pcb_merge",
    "walsh_hadamard",
    "haar",
    "hashed_lookup",
    "newton_schulz",
    "dct",
    "column_topk",
    "shared_store",
    "selective_scan",
    "bit_planes",
    "e3m0",
)
"""The operators with a Triton path."""


@dataclass(frozen=True)
class Target:
    """An architecture Triton compiles for.

    Attributes:
        backend, arch, warp: as Triton names them.
        shared: bytes of shared memory a block may use.
        shared_sm, registers_sm, warps_sm, blocks_sm: of one multiprocessor, for the occupancy; None where not modelled.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    shared_sm: int | None = None
    registers_sm: int | None = None
    warps_sm: int | None = None
    blocks_sm: int | None = None


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912, 167_936, 65_536, 64, 32),
    "sm_90": Target("cuda", 90, 32, 232_448, 233_472, 65_536, 64, 32),
    "sm_100": Target("cuda", 100, 32, 232_448, 233_472, 65_536, 64, 32),
    "gfx942": Target("hip", "gfx942", 64, 65_536),
}
RESERVED = 1024
"""Bytes of shared memory that a block on an NVIDIA GPU uses beside its own."""


@dataclass(frozen=True)
class Launch:
    """One configuration of one kernel.

    Attributes:
        kernel: as it is shown, "moe_mlp/up".
        function: the `triton.jit` function.
        signature: type of each run-time argument, such as "*bf16", "i32", "fp32".
        constants: values of the compile-time arguments.
        divisible: arguments known to be multiples of 16: aligned pointers, widths, strides. Without them nothing is
            loaded in vectors, and the figures say nothing.
        num_warps, num_stages: of the launch.
        dtype: of the data.
        shape: the widths this configuration is for, or the variant where one serves all widths.
        gemm: whether its products must use the tensor cores' own instruction (wgmma on sm_90).
        fused: whether a product may be joined with the sum that it goes into, and be rounded with it.
    """

    kernel: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    dtype: str
    shape: str
    gemm: bool
    fused: bool = True

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dtype} {self.shape}"


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one configuration for one target.

    Attributes:
        registers: of a thread (vector registers on AMD).
        spills: bytes of local memory a thread uses because registers ran out.
        shared: bytes of shared memory of a block.
        wgmma, tma, cp_async: instructions of the kind in the code: products on Hopper's tensor cores, copies of whole
            tiles, asynchronous copies; None where the target has no such thing.
        occupancy: warps resident on a multiprocessor over the most it holds, by registers and shared memory; None
            where it is not modelled.
        code: `digest` of what was compiled; with it, the target and Triton's version the other figures are decided.
    """

    kernel: str
    shape: str
    dtype: str
    target: str
    gemm: bool
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    wgmma: int | None
    tma: int | None
    cp_async: int | None
    occupancy: float | None
    code: str


def launches(operators: Iterable[str] = OPERATORS) -> list[Launch]:
    """The configurations of the operators, in their order."""
    found: list[Launch] = []
    for operator in operators:
        if operator not in OPERATORS:
            raise unknown("operator", operator, OPERATORS)
        found += import_module(f"workbench.kernels.{operator}.triton").launches()
    return found


def table(
    targets: Sequence[str] = tuple(TARGETS),
    operators: Iterable[str] = OPERATORS,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Figures]:
    """Compile every configuration for every target: minutes the first time, then from Triton's own cache.

    Args:
        progress: called as progress(done, all, what).
    """
    plan = [(launch, target) for target in targets for launch in launches(operators)]
    rows = []
    for done, (launch, target) in enumerate(plan):
        if progress is not None:
            progress(done, len(plan), f"{launch.name} {target}")
        rows.append(figures(launch, target))
    return rows


def compiled(launch: Launch, target: str) -> Any:
    """Triton's own result of compiling one configuration for one target; its `asm` holds the code of every stage.

    Raises:
        InputError: unknown target, or Triton interprets its kernels in this process.
    """
    _may_compile(target)
    import triton

    source, gpu, options = _parts(launch, TARGETS[target])
    return triton.compile(source, target=gpu, options=options)


def intermediate(launch: Launch, target: str) -> str:
    """The "ttir" stage of `compiled` alone: all of a kernel's own code, at a twentieth of the time. Raises as that.

    Triton has no public way to stop after a stage, so this follows `triton.compile` of the version in the snapshot.
    """
    _may_compile(target)
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, gpu, options = _parts(launch, TARGETS[target])
    backend, context, stages = make_backend(gpu), ir.context(), {}
    options = backend.parse_options(options | source.parse_options())
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(gpu, options, codegen, backend.get_module_map(), context)
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def digest(launch: Launch, target: str, ttir: str) -> str:
    """Of all that decides what the compiler makes of a kernel: its code, less places in files, target and launch."""
    code = re.sub(r" loc\((#loc\d*|\"[^\"]*\"\(#loc\d*\))\)", "", re.sub(r"(?m)^#loc.*\n", "", ttir))
    parts = [code, target, launch.num_warps, _stages(launch, TARGETS[target]), *(() if launch.fused else ("apart",))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _may_compile(target: str) -> None:
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError(
            "TRITON_INTERPRET is 1 but must be unset to compile: the kernels of this process are interpreted"
        )
    # without it Triton warns that its default will change
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _parts(launch: Launch, kind: Target) -> tuple[Any, Any, dict[str, int]]:
    """(source, target, options) as Triton's compiler takes them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.function.arg_names
    source = ASTSource(
        launch.function,
        signature={name: launch.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": _stages(launch, kind), "enable_fp_fusion": launch.fused}
    return source, GPUTarget(kind.backend, kind.arch, kind.warp), options


def _stages(launch: Launch, kind: Target) -> int:
    """Two at most on AMD, as its launches have: there is 64 KiB of shared memory."""
    return launch.num_stages if kind.backend == "cuda" else min(launch.num_stages, 2)


def figures(launch: Launch, target: str) -> Figures:
    """What the compiler makes of one configuration for one target. Raises as `compiled`."""
    code = compiled(launch, target)
    kind, shared = TARGETS[target], code.metadata.shared
    if kind.backend == "cuda":
        registers, spills = _nvidia(code.asm["cubin"])
        ptx = code.asm["ptx"]
        counts = {
            "wgmma": ptx.count("wgmma.mma_async") if kind.arch == 90 else None,
            "tma": ptx.count("cp.async.bulk.tensor") if kind.arch >= 90 else None,
            "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        }
    else:
        registers, spills = _amd(code.asm["amdgcn"])
        counts = {"wgmma": None, "tma": None, "cp_async": None}
    return Figures(
        launch.kernel,
        launch.shape,
        launch.dtype,
        target,
        launch.gemm,
        launch.num_warps,
        _stages(launch, kind),
        registers,
        spills,
        shared,
        occupancy=occupancy(kind, launch.num_warps, registers, shared),
        code=digest(launch, target, code.asm["ttir"]),
        **counts,
    )


def faults(row: Figures) -> list[str]:
    """What is wrong with a compiled configuration; empty for a sound one."""
    limit = TARGETS[row.target].shared
    found = [f"spills {row.spills} bytes"] if row.spills else []
    found += [f"uses {row.shared} bytes of shared memory, above {limit}"] if row.shared > limit else []
    found += ["multiplies without wgmma"] if row.gemm and row.wgmma == 0 else []
    return [f"{row.kernel} {row.dtype} {row.shape} on {row.target} {fault}" for fault in found]


def occupancy(target: Target, num_warps: int, registers: int, shared: int) -> float | None:
    """Resident warps over the most a multiprocessor holds; registers are given out in eights of a thread."""
    if target.registers_sm is None:
        return None
    by_registers = target.registers_sm // (-(-max(registers, 1) // 8) * 8 * 32 * num_warps)
    by_shared = target.shared_sm // (shared + RESERVED)
    blocks = min(by_registers, by_shared, target.warps_sm // num_warps, target.blocks_sm)
    return blocks * num_warps / target.warps_sm


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread, from the code object's resource usage."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


@cache
def _cuobjdump() -> str:
    """The one that comes with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _amd(code: str) -> tuple[int, int]:
    """(vector registers, scratch bytes) of a thread, from the metadata of the assembly."""
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code).group(1))
    return registers, int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", code).group(1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workbench.kernels.static", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--write", type=Path, metavar="SNAPSHOT", help="write the figures as JSON")
    args = parser.parse_args()
    rows = table(
        args.targets, args.operators, lambda done, total, what: print(f"{done + 1}/{total} {what}", flush=True)
    )
    if args.write:
        args.write.write_text(snapshot(rows))
    wrong = [fault for row in rows for fault in faults(row)]
    print("\n".join(wrong) if wrong else f"{len(rows)} configurations, all sound")
    return 1 if wrong else 0


def snapshot(rows: Iterable[Figures]) -> str:
    """The figures as JSON, one configuration a line, so that a difference is a line."""
    import triton

    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    return f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    raise SystemExit(main())
