"""Who writes programs: the rules and their grammar, what is taken out of an answer, a local model, one behind HTTP."""

import http.server
import json
import random
import threading

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.sandbox.source import refusal
from workbench.lib.search.fsap import build_prompt, corpus, source_problem
from workbench.lib.search.fsap_duplicates import ws_hash
from workbench.lib.search.fsap_generators import (
    CORRUPTIONS,
    HTTPGenerator,
    OfflineGenerator,
    TransformersGenerator,
    extract_code,
    laid_out,
)
from workbench.lib.search.fsap_programs import PLANS, Plan, Stage, read, write

KEY = "do-not-print-me-8127"


def prompt(n: int = 3, seed: int = 0) -> str:
    examples = corpus("digit")
    return build_prompt(examples[seed % len(examples)], examples, n, seed).text


@pytest.mark.parametrize("name", PLANS)
def test_a_program_is_read_back_in_every_layout(name: str):
    code, draw = write(PLANS[name]), random.Random(0)
    assert read(code) == PLANS[name] and source_problem(code) is None
    for _ in range(8):
        other = laid_out(code, draw)
        assert read(other) == PLANS[name] and ws_hash(other) == ws_hash(code)
    assert read(code.replace("nn.Dropout", "nn.AlphaDropout")) is None and read("(") is None


def test_wrong_plans_are_refused():
    with pytest.raises(InputError, match="stages are 0"):
        Plan(())
    with pytest.raises(InputError, match="pool 'men' is unknown"):
        Plan((Stage(8),), "men")
    with pytest.raises(InputError, match="must have stride 1 and width 8"):
        Plan((Stage(8), Stage(16, skip=True)))


def test_the_rules_say_that_they_are_no_language_model_and_repeat_themselves():
    generator = OfflineGenerator(3)
    assert not generator.info.is_llm and generator.info.kind == "offline"
    assert "not a language model" in OfflineGenerator.__doc__
    assert generator(prompt()) == OfflineGenerator(3)(prompt()) != OfflineGenerator(4)(prompt())
    plans = {read(extract_code(generator(prompt(seed=seed)))) for seed in range(20)}
    assert None not in plans and len(plans) > 10
    assert extract_code(generator("Write a network.")) is None


def test_without_changes_every_stage_is_one_of_an_example():
    shown = {stage for plan in PLANS.values() for stage in plan.stages}
    shown |= {Stage(s.width, s.kernel, s.stride, s.norm, s.activation) for s in shown}
    for seed in range(10):
        made = read(extract_code(OfflineGenerator(seed, mutation_rate=0)(prompt(6, seed))))
        assert set(made.stages) <= shown


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_each_corruption_is_harmless_and_changes_the_program(what: str):
    code = write(PLANS["deep"])
    broken = CORRUPTIONS[what](code)
    assert broken != code
    found = refusal(broken, ("torch", "torch.nn", "math"))
    assert (found[0] if found else None) == {"unclosed": "syntax", "import": "import"}.get(what)


def test_wrong_chances_are_refused():
    with pytest.raises(InputError, match=r"mutation_rate is 1\.5 but"):
        OfflineGenerator(mutation_rate=1.5)
    with pytest.raises(InputError, match="corruption is -1 but"):
        OfflineGenerator(corruption=-1)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("<nn>\nimport torch\n</nn> or\n```python\nx\n```", "import torch\n"),
        ("<nn>```python\nx = 1\n```</nn>", "x = 1\n"),
        ("Here:\n```python\nx = 1\n```\nand\n```python\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("Sure.\nimport torch\nx = 1", "import torch\nx = 1"),
        ("```python\nimport torch\nx = 1", "import torch\nx = 1"),
        ("I cannot.", None),
        ("", None),
    ],
)
def test_the_program_is_taken_out_of_the_answer(text: str, code: str | None):
    assert extract_code(text) == code


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as its server's `plan` says, and remembers what it was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(body)))
        status, text = self.server.plan
        if status == 0:
            self.wfile.write(b"no HTTP\r\n\r\n")
            return
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization"), None))

    def log_message(self, *said):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.asked, found.plan = [], (200, json.dumps({"choices": [{"message": {"content": "import x"}}]}).encode())
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_a_model_behind_http_is_asked_as_it_wants(server, monkeypatch):
    monkeypatch.setenv("FSAP_TEST_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no proxy is asked for this machine
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    generator = HTTPGenerator(url, "a-model", "FSAP_TEST_KEY", temperature=0.8)
    assert not server.asked, "nothing is asked before it is called"
    assert generator("Write.") == "import x" and generator.info.is_llm
    path, authorization, body = server.asked[0]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert body["model"] == "a-model" and body["messages"] == [{"role": "user", "content": "Write."}]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 0.95, 8192)
    assert KEY not in repr(vars(generator))
    HTTPGenerator(url, "a-model")("Write.")
    assert server.asked[1][1] is None


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ((401, KEY.encode()), "the server answered 401"),
        ((500, KEY.encode()), "the server answered 500"),
        ((302, b""), "the server answered 302"),
        ((200, b"not JSON " + KEY.encode()), "no chat completion"),
        ((200, b'{"choices": []}'), "no chat completion"),
        ((0, b""), "was not reached: BadStatusLine"),
        ((200, b" " * (5 << 20)), "more than 4194304 bytes"),
    ],
)
def test_what_goes_wrong_is_said_without_the_key(plan, said, server, monkeypatch):
    monkeypatch.setenv("FSAP_TEST_KEY", KEY)
    server.plan = plan
    generator = HTTPGenerator(f"http://localhost:{server.server_port}/v1", "a-model", "FSAP_TEST_KEY")
    with pytest.raises(InputError, match=said) as error:
        generator("Write.")
    assert KEY not in str(error.value) and error.value.__cause__ is None and len(server.asked) == 1


@pytest.mark.parametrize("key", [None, "", f"{KEY}\nX-Other: 1", f"{KEY}é"])
def test_a_key_that_is_not_there_or_is_none_is_said_without_it(key, monkeypatch):
    monkeypatch.delenv("FSAP_TEST_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("FSAP_TEST_KEY", key)
    with pytest.raises(InputError, match="FSAP_TEST_KEY") as error:
        HTTPGenerator("http://localhost:9/v1", "a-model", "FSAP_TEST_KEY")("Write.")
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["http://example.org/v1", "ftp://localhost/v1", "localhost", f"https://me:{KEY}@example.org/v1",
     f"https://example.org/v1?key={KEY}", "http://[", "https://example.org:port/v1"],
)  # fmt: skip
def test_a_wrong_address_is_refused_before_anything_is_asked(url: str):
    with pytest.raises(InputError, match="base_url") as error:
        HTTPGenerator(url, "a-model")
    assert KEY not in str(error.value)


def test_wrong_sampling_is_named():
    with pytest.raises(InputError, match="sampling has 'top_k' but may have temperature"):
        HTTPGenerator("https://example.org/v1", "a-model", top_k=5)
    with pytest.raises(InputError, match="seconds is 0 but"):
        HTTPGenerator("https://example.org/v1", "a-model", seconds=0)


def test_a_local_model_writes_and_leaves_torchs_generator_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", "[EOS]", "import", "torch", "x", "="])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")
    fast.save_pretrained(tmp_path)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64, "eos_token_id": 1, "bos_token_id": 1}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    generator = TransformersGenerator(tmp_path, seed=1, max_new_tokens=8)
    state = torch.get_rng_state()
    said = generator("import torch")
    assert isinstance(said, str) and torch.equal(torch.get_rng_state(), state)
    assert generator.info.is_llm and generator.info.id == tmp_path.name
    assert TransformersGenerator(tmp_path, seed=1, max_new_tokens=8)("import torch") == said


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"it has no config\.json"):
        TransformersGenerator(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="sampling has 'beams'"):
        TransformersGenerator(tmp_path, beams=4)
