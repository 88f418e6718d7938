#!/usr/bin/env bash
# transformers 5.24.0: NLLB-MoE computes every token with experts 0 and 1, whatever its router chooses.
#
# The router returns its first choice as a one-hot map (tokens, experts), and `NllbMoeExperts.forward` makes a one-hot
# encoding of that map again, as if its 0 and 1 were indices. Expert 1 gets every token once, with the weight of the
# token's first choice; expert 0 gets it once for each other expert, with the weight of the second choice or zero. The
# other experts are never called: their weights do not matter to the output, and have no gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

torch.manual_seed(0)
small = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
         (("layers", 1), ("ffn_dim", 16), ("attention_heads", 2), ("sparse_step", 1))}
config = NllbMoeConfig(vocab_size=64, d_model=16, num_experts=4, expert_capacity=64, **small)
model = NllbMoeForConditionalGeneration(config).eval()
block = model.model.encoder.layers[0].ffn
experts = [block.experts[f"expert_{i}"] for i in range(4)]
chosen, rows = [], [0] * 4
block.router.register_forward_hook(lambda module, args, output: chosen.extend(output[0].sum(0).tolist()))
for i, expert in enumerate(experts):
    expert.register_forward_hook(lambda module, args, output, i=i: rows.__setitem__(i, len(args[0])))
ids = {"input_ids": torch.arange(4, 28)[None], "decoder_input_ids": torch.tensor([[2, 5, 6]])}
with torch.no_grad():
    before = model(**ids).logits
    print("the router chooses every expert first for some token:", min(chosen) > 0)
    print("rows each expert is called with, for 24 tokens:", rows)
    for expert in experts[2:]:
        for weight in expert.parameters():
            weight.normal_()
    print("other weights in experts 2 and 3 change the output:", not torch.equal(model(**ids).logits, before))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
the router chooses every expert first for some token: True
rows each expert is called with, for 24 tokens: [72, 24, 0, 0]
other weights in experts 2 and 3 change the output: False
SEEN
echo "as described"
