#!/usr/bin/env bash
# diffusers 0.42.1: DDIMScheduler with timestep_spacing="trailing" makes a timestep too many for some counts, and it is -1.
#
# Asked for 61 steps of 1000 levels it makes 62, and of the 1000 counts that may be asked for 62 are so. The timesteps are
# np.arange(1000, 0, -1000 / 61), and whether a step of a float lands on its end is a matter of rounding; minus 1, and the
# last timestep is -1. It is taken as an index: the noise that is expected there is that of the last level, the noisiest,
# for an image that is all but done, and what a network gets wrong there counts for many times more. A denoiser whose
# noise is off by 0.01, told these timesteps, ends at 1.00, as it should, at 60 and at 62 steps, and at -0.57 at 61.
# Nothing is raised or warned of.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy diffusers==0.42.1
cat > "$folder/look.py" <<'PY'
from diffusers import DDIMScheduler


def scheduler(steps: int) -> DDIMScheduler:
    found = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing", clip_sample=False)
    found.set_timesteps(steps)
    return found


def denoised(steps: int) -> float:
    """Where an image of one pixel, 1, ends, if the noise of each level is told but for 0.01."""
    found = scheduler(steps)
    kept = found.alphas_cumprod[-1].double()
    x = kept.sqrt() + (1 - kept).sqrt() / 2
    for level in found.timesteps:
        kept = found.alphas_cumprod[level].double()
        x = found.step((x - kept.sqrt()) / (1 - kept).sqrt() + 0.01, level, x).prev_sample
    return x.item()


for steps in (60, 61, 62):
    levels = scheduler(steps).timesteps.tolist()
    print(f"{steps} steps: {len(levels)} timesteps, the last {levels[-2:]}, an image of 1 ends at {denoised(steps):.2f}")
wrong = [steps for steps in range(1, 1001) if len(scheduler(steps).timesteps) != steps]
print(f"{len(wrong)} of 1000 counts have one too many, the first {wrong[:5]}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
60 steps: 60 timesteps, the last [32, 16], an image of 1 ends at 1.00
61 steps: 62 timesteps, the last [15, -1], an image of 1 ends at -0.57
62 steps: 62 timesteps, the last [31, 15], an image of 1 ends at 1.00
62 of 1000 counts have one too many, the first [61, 103, 121, 122, 201]
SEEN
echo "as described"
