"""Figures of the kernels: what they are given is what they show, and a model is called a model."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures import kernels

ROWS = [
    {
        "case": case,
        "threads": threads,
        "direction": direction,
        "implementation": name,
        "median_s": 0.1 * base,
        "ratio_to_limit": base if case == "a" else None,
        "speedup_over": {peer: other / base for peer, other in TIMES.items() if peer != name},
    }
    for TIMES in [{"workbench": 1.25, "transformers/eager": 2.5, "transformers/grouped_mm": 2.0}]
    for case in ("a", "b")
    for threads in (1, 2)
    for direction in ("forward", "forward+backward")
    for name, base in TIMES.items()
]
STATIC = [
    {"kernel": "moe_mlp/up", "shape": "H=768 I=256", "dtype": "bf16", "target": "sm_90", "registers": 255}
    | {"spills": 0, "shared": 98304, "wgmma": 16, "tma": 0, "cp_async": 24, "threads": 256, "occupancy": 0.25},
    {"kernel": "moe_mlp/down", "shape": "H=768 I=256", "dtype": "bf16", "target": "sm_90", "registers": 128}
    | {"spills": 4, "shared": 65536, "wgmma": 8, "tma": 2, "cp_async": 0, "threads": 256, "occupancy": 0.125},
    {"kernel": "gather_sum", "shape": "H=768", "dtype": "bf16", "target": "sm_90", "registers": 40}
    | {"spills": 0, "shared": 0, "wgmma": 0, "tma": 0, "cp_async": 0, "threads": 128, "occupancy": 1.0},
    {"kernel": "gather_sum", "shape": "H=768", "dtype": "bf16", "target": "gfx942", "registers": 40}
    | {"spills": 0, "shared": 0, "wgmma": None, "tma": None, "cp_async": None, "threads": 128, "occupancy": None},
]
CELLS = [
    {"n_experts": e, "top_k": k, "tile": tile, "n_tokens": 4096, "tc": e / 1000, "rounding": 0.0, "changed": 0.1}
    for e, k in ((8, 2), (64, 2), (64, 8))
    for tile in (64, 128)
]


def texts(figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_ratios_to_the_bound_are_of_one_direction_and_thread_count():
    figure = kernels.bench_ratios(ROWS, threads=2)
    assert [bar.name for bar in figure.data] == ["workbench", "transformers/eager", "transformers/grouped_mm"]
    assert list(figure.data[0].x) == ["a", "b"] and figure.data[0].y[0] == 1.25 and np.isnan(figure.data[0].y[1])
    assert figure.layout.shapes[0].y0 == 1 and texts(figure) == ["bound"]
    assert figure.layout.yaxis.type == "log" and "bound: dense GEMMs of the same FLOPs" in figure.layout.title.text
    assert "forward+backward, 2 threads" in figure.layout.title.text


def test_speedups_are_ours_over_each_peer():
    figure = kernels.bench_speedups(ROWS, threads=1, direction="forward")
    assert {bar.name: list(bar.y) for bar in figure.data} == {
        "transformers/eager": [2.0, 2.0],
        "transformers/grouped_mm": [1.6, 1.6],
    }
    assert "forward, 1 thread ·" in figure.layout.title.text and texts(figure) == ["as fast"]


def test_timings_that_are_not_there_are_an_error():
    with pytest.raises(InputError, match="threads is 3 but rows are of"):
        kernels.bench_ratios(ROWS, threads=3)
    with pytest.raises(InputError, match="direction is 'backward'"):
        kernels.bench_speedups(ROWS, threads=1, direction="backward")
    with pytest.raises(InputError, match="ours is 'us'"):
        kernels.bench_speedups(ROWS, threads=1, ours="us")


def test_kept_bytes_are_in_mebibytes_over_a_doubling_axis():
    figure = kernels.kept_bytes([2, 4, 8], {"gather": [2**20, 2**21, 2**22], "ours": [2**20] * 3})
    assert list(figure.data[0].y) == [1, 2, 4] and list(figure.data[1].y) == [1, 1, 1]
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.ticktext) == ["2", "4", "8"]
    assert figure.layout.yaxis.title.text == "MiB"


def test_the_waste_map_is_in_percent_with_empty_cells_where_nothing_was_measured():
    figure = kernels.waste_map(CELLS, tile=128)
    (heat,) = figure.data
    assert (list(heat.y), list(heat.x)) == (["8", "64"], ["2", "8"])
    np.testing.assert_allclose(heat.z, [[0.8, np.nan], [6.4, 6.4]])
    assert heat.colorbar.title.text == "% of rows" and "tiles of 128 rows, 4096 tokens" in figure.layout.title.text
    assert (heat.zmin, heat.zmax) == (0, pytest.approx(6.4))
    (nothing,) = kernels.waste_map(CELLS, tile=64, what="rounding").data
    assert not np.nanmax(nothing.z) and nothing.zmax == 1
    with pytest.raises(InputError, match=r"tile is 32 but cells are of \[64, 128\]"):
        kernels.waste_map(CELLS, tile=32)
    with pytest.raises(InputError, match="what is 'padded'"):
        kernels.waste_map(CELLS, tile=64, what="padded")


def test_the_treemap_has_shared_memory_as_area_and_registers_as_colour():
    figure = kernels.static_treemap(STATIC)
    (tree,) = figure.data
    assert list(tree.parents) == ["", "sm_90", "moe_mlp", "moe_mlp", "sm_90", "gather_sum"]
    assert list(tree["values"]) == [163840 + 3072, 163840 + 2048, 98304 + 1024, 65536 + 1024, 1024, 1024]
    assert list(tree.marker.colors) == [0, 255, 255, 128, 40, 40]
    assert (tree.marker.cmin, tree.marker.cmax) == (0, 255)
    assert len(set(tree.ids)) == 6 and "sm_90" in figure.layout.title.text
    assert list(kernels.static_treemap(STATIC, target="gfx942").data[0].parents) == ["", "gfx942", "gather_sum"]
    with pytest.raises(InputError, match="target is 'sm_91' but rows are of gfx942, sm_90"):
        kernels.static_treemap(STATIC, target="sm_91")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_table_has_a_row_a_kernel_and_marks_spills(theme):
    (table,) = kernels.static_table(STATIC, theme=theme).data
    cells = dict(zip(kernels.COLUMNS, table.cells["values"], strict=True))
    assert list(cells["kernel"]) == [row["kernel"] for row in STATIC]
    assert list(cells["shared"]) == ["96.0", "64.0", "0.0", "0.0"]
    assert list(cells["wgmma"]) == ["16", "8", "0", "–"]
    assert list(cells["occupancy"]) == ["25 %", "12 %", "100 %", "–"]
    fills = [column[1] for column in table.cells.fill.color]
    assert len(set(fills)) == 1 and fills[0] != table.cells.fill.color[0][0]


def test_the_columns_of_the_table_are_as_wide_as_their_text():
    long = [row | {"kernel": "block_sparse_attention/pair_backward_kv"} for row in STATIC]
    figures = [kernels.static_table(rows) for rows in (STATIC, long)]
    for figure in figures:
        (table,) = figure.data
        texts = [
            [heading, *cells] for heading, cells in zip(kernels.COLUMNS.values(), table.cells["values"], strict=True)
        ]
        assert all(width > max(map(len, text)) for width, text in zip(table.columnwidth, texts, strict=True))
        assert figure.layout.width >= kernels.CHARACTER * sum(table.columnwidth)
    assert figures[1].layout.width > figures[0].layout.width


def test_errors_stand_on_a_log_axis_with_exact_ones_at_the_floor():
    figure = kernels.numerics({"cpu": {"out": 1e-7, "dx": 0.0}, "triton": {"out": 3e-6}}, tolerance=1e-5)
    cpu, triton = figure.data
    assert list(cpu.y) == [1e-7, 1e-17] and list(cpu.marker.symbol) == ["circle", "circle-open"]
    assert list(cpu.customdata) == ["1e-07", "exact"]
    assert list(figure.layout.xaxis.ticktext) == list(triton.text) == ["out", "dx"] and np.isnan(triton.y[1])
    assert all(round(x) == i for trace in figure.data for i, x in enumerate(trace.x))
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.shapes[0].y0 == 1e-5 and figure.layout.annotations[0].y == pytest.approx(-5)


def test_the_roofline_is_called_a_model_and_bounds_by_the_nearer_roof():
    figure = kernels.roofline(
        [{"name": "gather", "flops": 1e9, "bytes": 1e9}, {"name": "gemm", "flops": 1e12, "bytes": 1e9}],
        peak=989e12,
        bandwidth=3.35e12,
    )
    roof, gather, gemm = figure.data
    assert "a model, not a measurement" in figure.layout.title.text
    assert gather.y[0] == pytest.approx(3.35) and "bound by memory" in gather.hovertemplate
    assert gemm.y[0] == pytest.approx(989) and "bound by arithmetic" in gemm.hovertemplate
    assert list(roof.y[1:]) == pytest.approx([989, 989]) and roof.x[0] < gather.x[0] and roof.x[2] > gemm.x[0]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")


def test_attention_speedup_over_the_length():
    figure = kernels.attention_speedup([2048, 8192, 100], {"block 64": [1, 4, 0.5]}, threads=2)
    assert list(figure.layout.xaxis.ticktext) == ["2k", "8k", "100"] and list(figure.data[0].y) == [1, 4, 0.5]
    assert texts(figure) == ["as fast"] and "2 threads" in figure.layout.title.text
