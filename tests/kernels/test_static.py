"""The gate of the Triton kernels that needs no GPU: they compile, spill nothing, fit, and use the tensor cores.

After a change of a kernel: `python -m workbench.kernels.static --write tests/kernels/static_snapshot.json`.
"""

import dataclasses
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from addresses import narrow_addresses

from workbench.errors import InputError
from workbench.kernels import static

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

SNAPSHOT = Path(__file__).with_name("static_snapshot.json")
TARGETS = list(static.TARGETS)
KEY = ("kernel", "dtype", "shape", "target")
REFRESH = "python -m workbench.kernels.static --write tests/kernels/static_snapshot.json"


@cache
def expected() -> dict:
    return json.loads(SNAPSHOT.read_text())


def key(row: dict) -> tuple:
    return tuple(row[part] for part in KEY)


def rows_of(target: str) -> dict[tuple, dict]:
    """The snapshot's rows of one target, by their key; none of another version of Triton, which has other figures."""
    same = triton.__version__ == expected()["triton"]
    return {key(row): row for row in expected()["rows"] if same and row["target"] == target}


@cache
def codes(target: str) -> dict[str, str]:
    """The first intermediate code of every configuration, by its name.

    With the snapshot's version of Triton it is had without the rest of the work.
    """
    if rows_of(target):
        return {launch.name: static.intermediate(launch, target) for launch in static.launches()}
    return {launch.name: static.compiled(launch, target).asm["ttir"] for launch in static.launches()}


def in_full(target: str) -> set[str]:
    """The configurations compiled to the end in every case: of each kernel one, for the targets in turn."""
    first = {launch.kernel: launch.name for launch in reversed(static.launches())}
    return {name for at, name in enumerate(first.values()) if at % len(TARGETS) == TARGETS.index(target)}


def figures(launch: static.Launch, target: str) -> dict:
    """From the snapshot where the code is the one that was compiled for it: what follows from that does not change."""
    row = rows_of(target).get((launch.kernel, launch.dtype, launch.shape, target))
    known = row and row["code"] == static.digest(launch, target, codes(target)[launch.name])
    if known and launch.name not in in_full(target):
        return row
    return dataclasses.asdict(static.figures(launch, target))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
class TestTarget:
    def test_every_configuration_is_sound_and_as_the_snapshot_says(self, target: str):
        rows = [figures(launch, target) for launch in static.launches()]
        now, before = {key(row): row for row in rows}, rows_of(target)
        assert len(now) == len(rows) > 30
        assert [fault for row in rows for fault in static.faults(static.Figures(**row))] == []
        if not before:
            return  # another compiler, other figures; that they are sound is what holds everywhere
        changed = [
            f"{' '.join(name)}: {part} was {before.get(name, {}).get(part)} and is {now.get(name, {}).get(part)}"
            for name in sorted(before.keys() | now.keys())
            for part in (before.get(name) or now[name])
            if before.get(name, {}).get(part) != now.get(name, {}).get(part)
        ]
        assert not changed, "\n".join([*changed, f"if that is meant: {REFRESH}"])

    def test_rows_are_addressed_in_64_bits(self, target: str):
        """A row times a width or a stride may pass 2**31; a token times K is a pair, of which a plan has fewer."""
        for launch in static.launches():
            ttir = codes(target)[launch.name]
            assert [product for product in narrow_addresses(ttir) if "%top_k" not in product] == [], launch.name
            assert re.search(r"tt\.addptr .*(, |x)i64", ttir), launch.name

    def test_the_digest_is_of_all_that_was_compiled(self, target: str):
        """What is compiled to the end has the digest of the first stage alone, and any other code has another."""
        launch = static.launches(["gather_sum"])[0]
        ttir = codes(target)[launch.name]
        same = static.digest(launch, target, ttir)
        assert static.digest(launch, target, static.compiled(launch, target).asm["ttir"]) == same
        assert static.digest(launch, target, ttir.replace("triton.py", "moved.py")) == same  # where it is written
        assert ttir.count("divisibility = 16") and ttir.count("addf")
        others = [ttir.replace("divisibility = 16", "divisibility = 8", 1), ttir.replace("addf", "mulf", 1)]
        assert same not in [static.digest(launch, target, other) for other in others]
        changes = [{"num_warps": 2 * launch.num_warps}, {"num_stages": launch.num_stages - 1}, {"fused": False}]
        assert same not in [static.digest(dataclasses.replace(launch, **change), target, ttir) for change in changes]


def test_one_configuration_of_every_kernel_is_compiled_to_the_end():
    chosen = [name for target in TARGETS for name in in_full(target)]
    assert {name.split()[0] for name in chosen} == {launch.kernel for launch in static.launches()}
    assert all(in_full(target) for target in TARGETS)


def test_the_snapshot_covers_every_operator_both_types_and_all_targets():
    rows = expected()["rows"]
    assert {row["kernel"].split("/")[0] for row in rows} == set(static.OPERATORS)
    assert {row["dtype"] for row in rows} >= {"bf16", "fp16"} and {row["target"] for row in rows} == set(static.TARGETS)
    gemms = [row for row in rows if row["gemm"] and row["target"] == "sm_90"]
    assert gemms and all(row["wgmma"] > 0 for row in gemms)


@triton.jit
def _move(index, source, out, width, stride, ROW: tl.constexpr, PROGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """Gathers rows of a width into rows a stride apart; offsets of either are made in these types."""
    group = tl.program_id(0) // tl.cdiv(width, BLOCK)
    col = (tl.program_id(0) - group * tl.cdiv(width, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + group)
    t = tl.load(source + row.to(ROW) * width + col, mask=col < width, other=0.0)
    for i in range(4):
        tl.store(out + (group + i).to(PROGRAM) * stride + col, t, mask=col < width)


@pytest.mark.parametrize("row", [tl.int32, tl.int64], ids=str)
@pytest.mark.parametrize("program", [tl.int32, tl.int64], ids=str)
def test_narrow_addresses_are_found_in_the_code(row, program):
    """That of a row read from memory, that of one made from the program's number; not columns, which are small."""
    signature = {"index": "*i32", "source": "*bf16", "out": "*bf16", "width": "i32", "stride": "i32"}
    constants = {"ROW": row, "PROGRAM": program, "BLOCK": 64}
    launch = static.Launch("test/move", _move, signature, constants, (), 4, 1, "bf16", "any", False)
    found = narrow_addresses(static.compiled(launch, "sm_90").asm["ttir"])
    assert any("%width" in product for product in found) == (row == tl.int32)
    assert any("%stride" in product for product in found) == (program == tl.int32)
    assert len(found) == [row, program].count(tl.int32)


def test_faults_are_named():
    row = static.Figures("op/kernel", "d=64", "bf16", "sm_90", True, 4, 3, 255, 8, 300_000, 0, 0, 0, 0.25, "")
    assert static.faults(row) == [
        "op/kernel bf16 d=64 on sm_90 spills 8 bytes",
        "op/kernel bf16 d=64 on sm_90 uses 300000 bytes of shared memory, above 232448",
        "op/kernel bf16 d=64 on sm_90 multiplies without wgmma",
    ]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [(32, 8, 0, 1.0), (255, 4, 0, 0.125), (128, 8, 100_000, 0.25), (64, 4, 200_000, 4 / 64)],
)
def test_occupancy_is_bounded_by_registers_and_shared_memory(registers, warps, shared, expected):
    assert static.occupancy(static.TARGETS["sm_90"], warps, registers, shared) == expected
    assert static.occupancy(static.TARGETS["gfx942"], warps, registers, shared) is None


def test_wrong_input_is_named(monkeypatch: pytest.MonkeyPatch):
    launch = static.launches(["span_attention"])[0]
    with pytest.raises(InputError, match="target 'sm_91' is unknown; did you mean 'sm_90'"):
        static.figures(launch, "sm_91")
    with pytest.raises(InputError, match="operator 'moe_mpl' is unknown; did you mean 'moe_mlp'"):
        static.launches(["moe_mpl"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="TRITON_INTERPRET is 1 but must be unset"):
        static.figures(launch, "sm_90")
