#!/usr/bin/env bash
# POT 0.9.7.post1: the Gromov-Wasserstein coupling of two spaces depends on the unit their distances are measured in.
#
# Multiplying all distances of both spaces by s multiplies the objective by s^2 and leaves its minimisers as they are.
# `gromov_wasserstein` stops where a step gains less than `tol_abs=1e-9`, which is of the objective and not of its size:
# with distances of about 1e-5 it stops after one step, at a coupling that is a third worse, and says nothing. So it does
# where the distances are of that size because they are squared, or normalised by their sum and not by their mean.
# With `tol_abs=0` it goes on. Code: `generic_conditional_gradient` in ot/optim.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check POT==0.9.7.post1 numpy==2.4.6 scipy==1.17.1
cat > "$folder/look.py" <<'PY'
import numpy as np
import ot

generator = np.random.default_rng(0)
x, y = generator.normal(size=(30, 3)), generator.normal(size=(40, 5))
for unit, tolerance in ((1.0, 1e-9), (1e-2, 1e-9), (1e-5, 1e-9), (1e-5, 0.0)):
    a, b = (ot.dist(points * unit, metric="euclidean") for points in (x, y))
    _, log = ot.gromov.gromov_wasserstein(a, b, log=True, tol_abs=tolerance)
    value, steps = log["gw_dist"] / unit**2, len(log["loss"]) - 1
    print(f"unit {unit:g}, tol_abs {tolerance:g}: value below 1.5 units^2: {value < 1.5}, after one step: {steps == 1}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
unit 1, tol_abs 1e-09: value below 1.5 units^2: True, after one step: False
unit 0.01, tol_abs 1e-09: value below 1.5 units^2: True, after one step: False
unit 1e-05, tol_abs 1e-09: value below 1.5 units^2: False, after one step: True
unit 1e-05, tol_abs 0: value below 1.5 units^2: True, after one step: False
SEEN
test ! -s "$folder/warnings"
echo "as described"
