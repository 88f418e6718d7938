#!/usr/bin/env bash
# transformers 5.24.0: activation checkpointing that is switched off again leaves a frozen model's outputs with a graph.
#
# `activation_checkpointing_enable()` (and `gradient_checkpointing_enable()`, its older name) asks the embeddings for
# gradients by a forward hook, so that checkpoints of frozen layers have something to follow. The method that disables it
# leaves the hook: a model whose parameters are all frozen then gives logits that require a gradient, and keeps the
# activations of every forward for them. `disable_input_require_grads()` takes the hook off after the first time, but
# enabling twice forgets the earlier hook: after that no method of the model takes it off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
embeddings = model.get_input_embeddings()


def look(when: str) -> None:
    logits = model(torch.arange(6)[None]).logits
    print(f"{when}: logits require grad: {logits.requires_grad}, hooks: {len(embeddings._forward_hooks)}")


look("frozen")
model.activation_checkpointing_enable()
model.activation_checkpointing_disable()
look("enabled and disabled")
model.disable_input_require_grads()
look("and asked for no gradients of its input")
for _ in range(2):
    model.activation_checkpointing_enable()
    model.activation_checkpointing_disable()
model.disable_input_require_grads()
look("the same with two times of each")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
frozen: logits require grad: False, hooks: 0
enabled and disabled: logits require grad: True, hooks: 1
and asked for no gradients of its input: logits require grad: False, hooks: 0
the same with two times of each: logits require grad: True, hooks: 1
SEEN
echo "as described"
