#!/usr/bin/env bash
# triton 3.9.0: under TRITON_INTERPRET=1 a float32 that becomes a bfloat16 is cut off, where a GPU rounds to the nearest.
#
# The interpreter's guide says to compute bfloat16 in float32 and to cast. The cast back drops the last 16 bits: results
# are up to a whole step of bfloat16 too small, half of them, always towards 0, so that they also drift over a sum of many
# stores. `fp_downcast_rounding="rtne"`, which is the default and what a GPU does, is not looked at when it is asked for
# either. To float16 the same cast rounds as it should.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0  # torch may have brought another
cat > "$folder/look.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def narrow(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def narrow_to_nearest(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty, fp_downcast_rounding="rtne"))


def look(dtype: torch.dtype, steps: int) -> None:
    """A quarter, two, three and six quarters of a step above 1."""
    x = 1 + torch.tensor([1.0, 2.0, 3.0, 6.0]) / 2**steps
    print(f"{dtype}, by torch: {((x.to(dtype).float() - 1) * 2**steps / 4).tolist()} steps above 1")
    for kernel in (narrow, narrow_to_nearest):
        out = torch.empty(4, dtype=dtype)
        kernel[(1,)](x, out, N=4)
        print(f"{dtype}, by {kernel.fn.__name__}: {((out.float() - 1) * 2**steps / 4).tolist()}")


look(torch.bfloat16, 9)
look(torch.float16, 12)
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
torch.bfloat16, by torch: [0.0, 0.0, 1.0, 2.0] steps above 1
torch.bfloat16, by narrow: [0.0, 0.0, 0.0, 1.0]
torch.bfloat16, by narrow_to_nearest: [0.0, 0.0, 0.0, 1.0]
torch.float16, by torch: [0.0, 0.0, 1.0, 2.0] steps above 1
torch.float16, by narrow: [0.0, 0.0, 1.0, 2.0]
torch.float16, by narrow_to_nearest: [0.0, 0.0, 1.0, 2.0]
SEEN
echo "as described"
