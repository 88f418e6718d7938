#!/usr/bin/env bash
# torch 2.13.0: a tensor of eight-bit codes is compared with a Python number modulo 256, without a word.
#
# `codes < 256` is False for every uint8, and `codes == 256` is True where a code is 0: the number is cut to the type of
# the tensor first. So a check that codes lie below 2**bits refuses all of them at 8 bits, and one that they reach it
# passes. `clamp(max=256)` says that 256 is no uint8; numpy compares the numbers. int(codes.max()) < 2**bits is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/look.py" <<'PY'
import torch

codes = torch.tensor([0, 128, 255], dtype=torch.uint8)
for bits in (7, 8):
    print(f"below {2**bits}: {(codes < 2**bits).tolist()} by torch, {(codes.numpy() < 2**bits).tolist()} by numpy")
print(f"equal to 256: {(codes == 256).tolist()} by torch, {(codes.numpy() == 256).tolist()} by numpy")
try:
    codes.clamp(max=256)
except RuntimeError as error:
    print(f"clamped at 256: {error}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
below 128: [True, False, False] by torch, [True, False, False] by numpy
below 256: [False, False, False] by torch, [True, True, True] by numpy
equal to 256: [True, False, False] by torch, [False, False, False] by numpy
clamped at 256: value cannot be converted to type uint8_t without overflow
SEEN
echo "as described"
