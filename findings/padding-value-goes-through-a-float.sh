#!/usr/bin/env bash
# torch 2.13.0: the value that pads whole numbers goes through a float, and the largest becomes the smallest.
#
# Positions of sequences of unequal lengths are padded with the largest integer, so that padding lies behind every
# token and a causal mask `key <= query` leaves it out. `pad_sequence` and `nn.functional.pad` take the value as a C++
# double: 2^63 - 1 rounds to 2^63 there, which int64 has not, and comes back as -2^63. Padding then lies before every
# token, and all of them see it. Any value above 2^53 may come back as another; nothing is said. `torch.full` is exact.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.13.0 numpy==2.4.6
cat >"$folder/pad.py" <<'PYTHON'
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

found = {}
for value in (2**63 - 1, 2**53 + 1):
    sequence = pad_sequence([torch.arange(2), torch.arange(1)], batch_first=True, padding_value=value)[1, 1].item()
    constant = pad(torch.arange(1), (0, 1), value=value)[1].item()
    full = torch.full((1,), value).item()
    found[value] = (sequence, constant, full)
    print(f"{value}: pad_sequence {sequence}, pad {constant}, full {full}")
keys = pad_sequence([torch.arange(3), torch.arange(2)], batch_first=True, padding_value=2**63 - 1)
print("keys that the first token of the shorter sequence sees:", (keys[1] <= 0).tolist())
assert found[2**63 - 1] == (-(2**63), -(2**63), 2**63 - 1)
assert found[2**53 + 1] == (2**53, 2**53, 2**53 + 1)
assert (keys[1] <= 0).tolist() == [True, False, True]
PYTHON
"$folder/venv/bin/python" "$folder/pad.py"
# 9223372036854775807: pad_sequence -9223372036854775808, pad -9223372036854775808, full 9223372036854775807
# 9007199254740993: pad_sequence 9007199254740992, pad 9007199254740992, full 9007199254740993
# keys that the first token of the shorter sequence sees: [True, False, True]
