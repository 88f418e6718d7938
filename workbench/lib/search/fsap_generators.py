"""What writes programs for `fsap`: a local language model, one behind HTTP, and rules that are no language model.

A generator is called with a prompt and returns text; `.info` says its kind, its id, and whether it is a language model.
"""

import hashlib
import http.client
import json
import os
import random
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from workbench.errors import InputError
from workbench.lib.search.fsap_programs import (
    ACTIVATIONS,
    KERNELS,
    MOST_STAGES,
    POOLS,
    WIDTHS,
    Plan,
    Stage,
    mended,
    read,
    write,
)

FENCED = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
SAMPLING = {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "max_new_tokens": 8192}
LONGEST_REPLY = 4 << 20  # bytes


@dataclass(frozen=True)
class Info:
    """What a generator is: "offline", "transformers" or "http"; a folder, a model's name, or a seed; a model or not."""

    kind: str
    id: str
    is_llm: bool


@runtime_checkable
class Generator(Protocol):
    """What writes programs: text for a prompt."""

    info: Info

    def __call__(self, prompt: str) -> str: ...


class OfflineGenerator:
    """Rule-based recombination of the example programs, not a language model.

    It reads the stages of the programs in the prompt, takes each stage from one of them, the main one half of the time,
    changes some of it, and prints a program in a layout that is drawn too. It does not read what the prompt says, nor
    the accuracies. What it makes is evidence neither for nor against what a language model makes of examples. The same
    prompt gives the same program.

    Args:
        seed: of everything.
        mutation_rate: chance that a stage, or the head, is changed.
        corruption: chance that the program is then broken in one of `CORRUPTIONS`, so that validators have work.
    """

    def __init__(self, seed: int = 0, mutation_rate: float = 0.3, corruption: float = 0.0):
        for name, value in (("mutation_rate", mutation_rate), ("corruption", corruption)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value} but must be from 0 to 1")
        self.seed, self.mutation_rate, self.corruption = seed, mutation_rate, corruption
        self.info = Info("offline", f"rules, seed {seed}", False)

    def __call__(self, prompt: str) -> str:
        plans = [plan for code in FENCED.findall(prompt) if (plan := read(code)) is not None]
        if not plans:
            return "There is no program in the prompt that these rules can read."
        digest = hashlib.blake2b(f"{self.seed}\n{prompt}".encode(), digest_size=8).digest()
        draw = random.Random(int.from_bytes(digest, "big"))
        code = laid_out(write(self._mutated(self._crossed(plans, draw), draw)), draw)
        if draw.random() < self.corruption:
            code = CORRUPTIONS[draw.choice(sorted(CORRUPTIONS))](code)
        return f"```python\n{code}```"

    def _crossed(self, plans: list[Plan], draw: random.Random) -> Plan:
        def parent() -> Plan:
            return plans[0] if draw.random() < 0.5 else draw.choice(plans)

        stages = []
        for place in range(len(parent().stages)):
            given = parent().stages
            stages.append(given[min(place, len(given) - 1)])
        head = parent()
        return Plan(mended(stages), head.pool, head.side, head.hidden)

    def _mutated(self, plan: Plan, draw: random.Random) -> Plan:
        stages = [self._changed(stage, draw) if self._rolls(draw) else stage for stage in plan.stages]
        if self._rolls(draw) and len(stages) < MOST_STAGES:
            last = stages[-1]
            stages.append(replace(last, stride=1, skip=draw.random() < 0.5))
        if self._rolls(draw):
            plan = replace(
                plan, pool=draw.choice(sorted(POOLS)), side=draw.choice((1, 2)), hidden=draw.choice((0, 16, 32))
            )
        return replace(plan, stages=mended(stages))

    def _changed(self, stage: Stage, draw: random.Random) -> Stage:
        what = draw.choice(("width", "kernel", "stride", "norm", "activation", "skip"))
        choices: dict[str, tuple[Any, ...]] = {
            "width": WIDTHS, "kernel": KERNELS, "stride": (1, 2), "norm": (True, False),
            "activation": tuple(ACTIVATIONS), "skip": (True, False),
        }  # fmt: skip
        return replace(stage, **{what: draw.choice(choices[what])})

    def _rolls(self, draw: random.Random) -> bool:
        return draw.random() < self.mutation_rate


def laid_out(code: str, draw: random.Random) -> str:
    """The same program in another layout: indentation, blank lines, spaces round "=" inside calls."""
    indent, blanks, loose = draw.choice((2, 4, 8)), draw.choice((0, 1, 2)), draw.random() < 0.5
    lines = []
    for line in code.splitlines():
        body = line.lstrip()
        depth = (len(line) - len(body)) // 4
        if not body:
            continue
        if body.startswith(("def ", "class ")):
            lines += [""] * blanks
        body = re.sub(r"(\w)=(\w)", r"\1 = \2", body) if loose else body
        lines.append(" " * (depth * indent) + body)
    return "\n".join(lines) + "\n"


#: What a language model gets wrong, one of each kind; all harmless.
CORRUPTIONS = {
    "unclosed": lambda code: code.replace("nn.Dropout(", "nn.Dropout((", 1),
    "import": lambda code: "import os\n" + code,
    "lacks a method": lambda code: code.replace("def learn(", "def teach(", 1),
    "unused hyper-parameter": lambda code: code.replace('"dropout"}', '"dropout", "decay"}', 1),
    "wrong width": lambda code: re.sub(r"out_shape\[0\]\)", "out_shape[0] + 1)", code, count=1),
    "wrong channels": lambda code: code.replace("in_shape[1]", "in_shape[2]", 1),
    "loops": lambda code: re.sub(r"( +)(self\.train\(\))", r"\1while True: pass\n\1\2", code, count=1),
}


class TransformersGenerator:
    """A causal language model of a folder on this machine, by transformers; nothing is fetched, no code of it is run.

    Args:
        path: of the folder, with safetensors and a tokenizer.
        seed: of the sampling; torch's global generator is left as it was.
        sampling: `temperature`, `top_k`, `top_p`, `max_new_tokens`; the paper's otherwise.
    """

    def __init__(self, path: str | Path, seed: int = 0, **sampling: Any):
        path = Path(path)
        if not (path / "config.json").is_file():
            raise InputError(f"path is {path} but must be a folder with a model: it has no config.json")
        if strange := sorted(sampling.keys() - SAMPLING.keys()):
            raise InputError(f"sampling has {strange[0]!r} but may have {', '.join(SAMPLING)}")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise InputError("TransformersGenerator needs transformers: pip install 'workbench[hf]'") from None
        local = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(str(path), **local)
        self.model = AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, **local).eval()
        self.seed, self.sampling, self.calls = seed, SAMPLING | sampling, 0
        self.info = Info("transformers", path.name, True)

    def __call__(self, prompt: str) -> str:
        import torch

        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        tokens = self.tokenizer(prompt, return_tensors="pt")
        self.calls += 1
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed + self.calls)
            found = self.model.generate(
                tokens["input_ids"], attention_mask=tokens["attention_mask"], do_sample=True,
                pad_token_id=self.tokenizer.eos_token_id, **self.sampling,
            )  # fmt: skip
        return self.tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


class HTTPGenerator:
    """A language model behind an address that takes OpenAI's chat completions, such as vLLM's or llama.cpp's server.

    Nothing is asked before it is called. The key is read from the environment at each call, goes into one header of a
    request to this address, and into no message: redirections are not followed, and no proxy is asked for this machine.

    Args:
        base_url: such as "http://localhost:8000/v1"; https, but for this machine.
        model: the name that the server knows.
        key_env: name of the environment variable that holds the key; None where none is needed.
        seconds: to wait.
        sampling: as of `TransformersGenerator`, of which a server of this kind takes no `top_k`.
    """

    def __init__(self, base_url: str, model: str, key_env: str | None = None, seconds: float = 600.0, **sampling: Any):
        try:
            parts = urlsplit(base_url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise InputError("base_url is no address") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError("base_url must have no user, password or query: a key belongs into the environment")
        self.local = host in ("localhost", "127.0.0.1", "::1")
        if not host or parts.scheme not in (("http", "https") if self.local else ("https",)):
            raise InputError(f"base_url is {base_url!r} but must begin with https://, or http://localhost")
        if not 0 < seconds <= 24 * 3600:
            raise InputError(f"seconds is {seconds} but must be above 0, at most a day")
        if strange := sorted(sampling.keys() - (SAMPLING.keys() - {"top_k"})):
            raise InputError(f"sampling has {strange[0]!r} but may have temperature, top_p, max_new_tokens")
        self.url, self.model = base_url.rstrip("/") + "/chat/completions", model
        self.key_env, self.seconds = key_env, seconds
        self.sampling = SAMPLING | sampling
        self.info = Info("http", model, True)

    def __call__(self, prompt: str) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            key = os.environ.get(self.key_env)
            if not key:
                raise InputError(f"the environment has no {self.key_env}, which is to hold the key")
            if not key.isascii() or not key.isprintable():
                raise InputError(f"{self.key_env} holds no key: it has letters that no header takes")
            headers["Authorization"] = f"Bearer {key}"
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"temperature": self.sampling["temperature"], "top_p": self.sampling["top_p"]}
        body["max_tokens"] = self.sampling["max_new_tokens"]
        asked = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        proxies = [urllib.request.ProxyHandler({})] if self.local else []
        try:
            with urllib.request.build_opener(_NoRedirect, *proxies).open(asked, timeout=self.seconds) as reply:
                text = reply.read(LONGEST_REPLY + 1)
            if len(text) > LONGEST_REPLY:
                raise InputError(f"{self.model} answered with more than {LONGEST_REPLY} bytes")
            found = json.loads(text)["choices"][0]["message"]["content"]
        except InputError:
            raise
        except urllib.error.HTTPError as error:
            raise InputError(f"{self.model} was not reached: the server answered {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{self.model} was not reached: {type(error).__name__}") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise InputError(f"{self.model} answered with what is no chat completion") from None
        return found if isinstance(found, str) else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *asked: Any) -> None:
        return None


def extract_code(text: str) -> str | None:
    """The program in an answer: of a block in <nn> tags, else of the first fence, else from the first import on."""
    if found := re.search(r"<nn>\s*\n?(.*?)</nn>", text, re.DOTALL):
        text = found.group(1)
    if found := FENCED.search(text):
        return found.group(1)
    if found := re.search(r"^(?:import|from) \w.*", text, re.DOTALL | re.MULTILINE):
        return found.group(0)
    return None
