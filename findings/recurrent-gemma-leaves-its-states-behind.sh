#!/usr/bin/env bash
# transformers 5.24.0: beams of RecurrentGemma go on from states that are not theirs.
#
# A beam search with a cache reorders the cache when beams change places. The recurrent states and the convolution's last
# inputs of RecurrentGemma are attributes of its modules and in no cache, so they stay where they were: a beam that has
# moved is continued with the state of another. With `use_cache=False`, or with one beam, nothing of it happens. The gap of
# the logits says it; nothing is raised or warned.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat >"$folder/beams.py" <<'PYTHON'
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

torch.manual_seed(0)
config = RecurrentGemmaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, lru_width=16, head_dim=8, attention_window_size=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = RecurrentGemmaForCausalLM(config).eval()
for parameter in model.parameters():
    if parameter.ndim > 1:
        parameter.data.normal_(0, 0.5)
ids = torch.randint(3, 31, (2, 6))


def logits(beams, use_cache):
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        num_beams=beams, use_cache=use_cache, return_dict_in_generate=True, output_logits=True,
    )
    return torch.stack(found.logits)


gaps = {beams: (logits(beams, True) - logits(beams, False)).abs().amax((1, 2)).tolist() for beams in (1, 2)}
for beams, gap in gaps.items():
    print(f"{beams} beam(s), logits of each new token with and without a cache: " + ", ".join(f"{g:.0e}" for g in gap))
assert max(gaps[1]) < 1e-4, "one beam differs as well"
assert gaps[2][0] < 1e-4 and max(gaps[2][1:]) > 0.1, "beams have their own states now"
PYTHON
"$folder/venv/bin/python" "$folder/beams.py"
# 1 beam(s), logits of each new token with and without a cache: 0e+00, 2e-06, 3e-06, 4e-06
# 2 beam(s), logits of each new token with and without a cache: 0e+00, 2e-06, 5e+00, 5e+00
