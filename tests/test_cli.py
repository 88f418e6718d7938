"""The shell: what each command prints, its exit status, and one line for everything that is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from tests.conftest import PATIENCE
from tests.live.synthetic import synthetic_meta, write_synthetic_run
from workbench import catalogue, doctor, notebook
from workbench.cli import build_parser, main
from workbench.cli import progress as progress_module
from workbench.cli.progress import progress_bar, progress_of
from workbench.engines import EVERY_CORE
from workbench.errors import WorkerLostError
from workbench.live.arm import Arm
from workbench.live.recipe import Recipe
from workbench.live.store import RunStopped, RunWriter

COMMANDS = (
    "methods",
    "method",
    "study",
    "verdicts",
    "bench",
    "merge",
    "mix",
    "search",
    "simulate",
    "live",
    "view",
    "run",
    "runs",
    "resume",
    "export",
    "data",
    "where",
    "doctor",
)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture):
    """Call the command: (exit status, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in argv])
        except SystemExit as exit_:  # argparse, after --help and --version
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def two_runs(home: Path) -> Path:
    """A finished run of 3 steps, and a folder of which the database is rubbish."""
    write_synthetic_run(home / "runs" / "good", 3, n_layers=2, n_experts=4, n_tokens=64, seed=5)
    (home / "runs" / "bad").mkdir()
    (home / "runs" / "bad" / "run.sqlite").write_text("rubbish" * 1000)
    return home / "runs"


# -- help and errors


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(shell, command: str):
    status, out, err = shell(*command.split(), "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: workbench {command}".rstrip())


def test_no_command_is_missing_from_the_help(shell):
    out = shell("--help")[1]
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("metods", "command 'metods' is unknown; did you mean 'methods'"),
        ("methods --family rooting", "family 'rooting' is unknown; did you mean 'routing'"),
        ("methods --state ready", "unrecognized arguments: --state ready"),
        ("method remx", "slug 'remx' is unknown; did you mean 'remix'"),
        ("study remx", "slug 'remx' is unknown; did you mean 'remix'"),
        ("study not-yet", "slug 'not-yet' is planned: it has no study yet"),
        ("study rmoe --preset smal", "preset 'smal' is unknown; did you mean 'small'"),
        ("study rmoe --seed -1", "--seed: is '-1' but must be a whole number from 0 to 2147483647"),
        ("study rmoe --seeds none", "--seeds: is 'none' but must be a whole number of at least 1"),
        ("study rmoe --preset smoke --seeds 1", "seeds is 1 but must be from 2, as smoke has, to 1000"),
        ("study rmoe --preset smoke --seeds 1001", "seeds is 1001 but must be from 2, as smoke has, to 1000"),
        ("results rmoee", "slug 'rmoee' is unknown; did you mean 'rmoe'"),
        ("study rmoe --jobs 0", "--jobs: is '0' but must be a whole number of at least 1"),
        ("verdicts", "the following arguments are required: --html"),
        ("verdicts --html page.txt", "--html is 'page.txt' but must be a file that ends in .html"),
        ("verdicts --html /proc/page.html", "--html is '/proc/page.html' but cannot be written"),
        ("bench meo", "bench 'meo' is unknown; did you mean 'moe'"),
        ("bench moe --threads 0", "--threads: is '0' but must be a whole number of at least 1"),
        ("live --lr much", "--lr: invalid float value: 'much'"),
        ("live --study mixlra", "'mixlra' is unknown; did you mean 'mixlora'"),
        ("live --study mixlora --arm mixlor", "'mixlor' is unknown; did you mean 'mixlora'"),
        ("live --study mixlora --arm mixlora mixlora", "--arm is 'mixlora', 'mixlora' but must be one arm, or two"),
        ("live --study mixlora --preset smal", "preset 'smal' is unknown; did you mean 'small'"),
        ("live --study mixlora --top-k 3", "--top-k is of the language model, but --study is mixlora"),
        ("live --study moa", "arm 'dense' of moa trains nothing that could be watched: spans are fitted"),
        ("live --arm mixlora", "--arm needs a --study"),
        ("live --top-k 99", "top_k is 99 but must be between 1 and"),
        ("live --port 70000", "--port: is '70000' but must be a whole number from 1 to 65535"),
        ("view god", "run 'god' is unknown; did you mean 'good'"),
        ("view bad", "bad"),
        ("view good --port 0", "--port: is '0' but must be a whole number from 1 to 65535"),
        ("run no_such_notebook", "notebook 'no_such_notebook' is unknown"),
        ("resume god", "run 'god' is unknown; did you mean 'good'"),
        ("resume bad", "bad"),
        ("export god out", "run 'god' is unknown; did you mean 'good'"),
        ("export good /proc/nowhere", "cannot be exported"),
        ("data ged digits", "action 'ged' is unknown; did you mean 'get'"),
        ("data get", "data get needs the NAME"),
        ("data get dogits", "data set 'dogits' is unknown; did you mean 'digits'"),
        ("data describe dogits", "data set 'dogits' is unknown; did you mean 'digits'"),
        ("data describe digits mnist-1d", "takes one NAME"),
        ("data list digits", "data list takes no name"),
        ("where aps", "what 'aps' is unknown; did you mean 'apps'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(shell, planned, two_runs: Path, argv: str, message: str):
    status, out, err = shell(*argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("workbench: error: ") and err.count("\n") == 1
    assert message in err


# -- catalogue and studies


def test_methods_lists_the_catalogue(shell):
    status, out, _ = shell("methods")
    assert status == 0 and out.splitlines()[-1] == f"70 methods, {len(catalogue.methods(status='ready'))} ready"
    rows = json.loads(shell("methods", "--json")[1])
    assert rows == [row.as_dict() for row in catalogue.methods()]
    assert [row["slug"] for row in json.loads(shell("methods", "--family", "attention", "--json")[1])] == [
        "moa",
        "moba",
    ]


def test_method_prints_what_python_prints(shell):
    assert shell("method", "remix")[1] == f"{catalogue.method('remix')}\n"
    assert json.loads(shell("method", "remix", "--json")[1]) == catalogue.method("remix").as_dict()


def test_verdicts_writes_one_file_with_every_system(shell, tmp_path: Path):
    file = tmp_path / "new" / "v.html"
    assert shell("verdicts", "--html", file) == (0, f"{file}\n", "")
    text = file.read_text()
    assert all(f'id="{row.slug}"' in text for row in catalogue.methods())
    assert [path.name for path in file.parent.iterdir()] == ["v.html"]
    assert json.loads(shell("verdicts", "--html", file, "--json")[1]) == {"html": str(file)}


def test_bench_passes_on_what_is_asked_and_prints_the_tables(shell, monkeypatch: pytest.MonkeyPatch):
    asked = []
    row = {"case": "T=4", "threads": 1, "direction": "forward", "implementation": "workbench", "median_s": 0.0125}
    row |= {"ratio_to_limit": 1.5, "speedup_over": {"transformers/eager": 2.0}}

    def run_bench(name: str, *, threads, repeats, quick, progress) -> dict:
        asked.append((name, tuple(threads), repeats, quick))
        machine = {"torch": "2", "capability": "AVX2"}
        parts = {"bench": name, "machine": machine, "repeats": 3, "record": "there.json"}
        return parts | {"rows": [dict(row)], "saved": [{"k": 2, "bytes": 64}]}

    monkeypatch.setattr("workbench.bench.run", run_bench)
    status, out, _ = shell("bench", "moe", "--threads", 1, 2, "--repeats", 3)
    assert status == 0 and asked == [("moe", (1, 2), 3, False)]
    assert "12.5  1.50      2.00 x transformers/eager" in out and "saved: k  bytes\n2         64\n" in out
    assert "there.json" in out
    status, out, _ = shell("bench", "moe", "attention", "--quick", "--json")
    assert status == 0 and asked[1:] == [("moe", (1, 2), None, True), ("attention", (1, 2), None, True)]
    found = json.loads(out)
    assert found["rows"] == [row, row] and [each["bench"] for each in found["benches"]] == ["moe", "attention"]


def test_study_passes_on_what_is_asked_and_prints_the_result(shell, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Result:
        def __str__(self) -> str:
            return "the verdict"

        def to_dict(self) -> dict:
            return {"verdict": "reproduced"}

    def run_study(*args, progress, **options) -> Result:
        asked.append((args, options))
        progress(1, 2, "half")
        return Result()

    row = catalogue.Method("rmoe", "T", "routing", 2024, "X 2024", "C.")
    monkeypatch.setattr("workbench.catalogue.method", lambda slug: row)
    monkeypatch.setattr("workbench.studies.core.run_study", run_study)
    assert shell("study", "rmoe") == (0, "the verdict\n", "")
    options = ("--preset", "smoke", "--seed", 3, "--seeds", 12, "--jobs", 1, "--fresh", "--json")
    options += ("--engine", "dask", "--address", "tcp://head:8786")
    status, out, _ = shell("study", "rmoe", *options)
    assert (status, json.loads(out)) == (0, {"verdict": "reproduced"})
    assert asked == [
        (("rmoe", "small", None, None), {"jobs": None, "engine": "loky", "address": None, "fresh": False}),
        (
            ("rmoe", "smoke", 3, 12),
            {"jobs": 1, "engine": "dask", "address": "tcp://head:8786", "fresh": True},
        ),
    ]


def test_an_interrupted_study_says_that_it_goes_on(shell, monkeypatch: pytest.MonkeyPatch):
    def run_study(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.studies.core.run_study", run_study)
    said = "workbench: interrupted: the rows that are done are kept; the same command goes on from there\n"
    assert shell("study", "rmoe") == (130, "", said)


def test_a_study_whose_workers_die_is_one_line_and_status_1(shell, monkeypatch: pytest.MonkeyPatch):
    def run_study(*_, **__) -> None:
        raise WorkerLostError("one, 3: the worker died 3 times")

    monkeypatch.setattr("workbench.studies.core.run_study", run_study)
    assert shell("study", "rmoe") == (1, "", "workbench: one, 3: the worker died 3 times\n")


def test_study_prints_the_seeds_that_are_needed(shell, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Study:
        def measure_power(self, *args) -> str:
            asked.append(args[:-1])
            return "12 seeds"

    monkeypatch.setattr("workbench.studies.core.load_study", lambda slug: Study())
    assert shell("study", "rmoe", "--power", "--preset", "smoke") == (0, "12 seeds\n", "")
    assert asked == [("smoke", None, EVERY_CORE)]
    status, _, err = shell("study", "rmoe", "--power", "--fresh")
    assert status == 2 and "--power takes neither --seeds nor --fresh" in err


# -- runs


def test_runs_are_listed_with_their_state_and_a_damaged_one_is_no_obstacle(shell, two_runs: Path):
    rows = {row["name"]: row for row in json.loads(shell("runs", "--json")[1])}
    assert rows["good"] | {"created": 0, "message": 0} == {
        "name": "good", "folder": str(two_runs / "good"), "created": 0, "state": "finished", "message": 0,
        "kind": "train", "seed": 5, "steps": 3, "total_steps": 3, "weights_sha256": None,
    }  # fmt: skip
    assert rows["bad"]["state"] == "damaged" and rows["bad"]["message"]
    status, out, _ = shell("runs")
    assert status == 0 and "3/3" in out and out.splitlines()[-1] == f"2 runs in {two_runs}"


def test_no_runs_at_all_is_no_error(shell, home: Path):
    assert shell("runs", "--json")[:2] == (0, "[]\n")
    assert shell("runs")[1].splitlines()[-1] == f"0 runs in {home / 'runs'}"


def test_resume_continues_the_run_and_says_where_it_is(shell, two_runs: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("workbench.live.trainer.resume", lambda folder, progress: asked.append(folder))
    status, out, _ = shell("resume", "good", "--processes", 1)
    assert (status, out) == (0, f"good: finished after 3 steps, kept at {two_runs / 'good'}\n")
    assert json.loads(shell("resume", two_runs / "good", "--processes", 1, "--json")[1])["steps"] == 3
    assert asked == [two_runs / "good"] * 2


@pytest.mark.parametrize("error", [RunStopped("no space left"), FloatingPointError("the loss is nan at step 7")])
def test_a_run_that_ends_badly_is_one_line_and_status_1(shell, two_runs: Path, monkeypatch, error: Exception):
    def fail(folder, progress):
        raise error

    monkeypatch.setattr("workbench.live.trainer.resume", fail)
    assert shell("resume", "good", "--processes", 1) == (1, "", f"workbench: {error}\n")


def test_a_resumed_run_that_is_interrupted_says_how_to_go_on(shell, two_runs: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(folder: Path, progress) -> None:
        with RunWriter.open(folder) as writer:
            writer.status("stopped", "stopped by SIGINT after 3 of 9 steps")

    monkeypatch.setattr("workbench.live.trainer.resume", stopped)
    said = f"good: stopped after 3 steps, kept at {two_runs / 'good'}; go on with: workbench resume good"
    assert shell("resume", "good", "--processes", 1) == (130, "", f"workbench: interrupted: {said}\n")


def test_export_writes_parquet(shell, two_runs: Path, tmp_path: Path):
    assert shell("export", "good", tmp_path / "a") == (0, f"{tmp_path / 'a'}\n", "")
    files = json.loads(shell("export", "good", tmp_path / "b", "--json")[1])["files"]
    assert {"meta.json", "scalars.parquet", "events.parquet"} < set(files)
    assert all((tmp_path / "b" / name).is_file() for name in files)


def test_a_run_being_written_is_listed_as_running(shell, home: Path):
    meta = synthetic_meta(10, 1, 2, 1, 0, ("python",))
    with RunWriter.create(home / "runs" / "now", meta) as writer:
        writer.status("running")
        assert json.loads(shell("runs", "--json")[1])[0]["state"] == "running"


# -- live


def test_live_passes_on_only_what_is_given(shell, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("workbench.live.serve.live", lambda *args, **kwargs: asked.append((args, kwargs)))
    assert shell("live")[0] == 0
    words = "--steps 5 --top-k 1 --balance 0 --domains python,docs --port 5010 --no-browser --address 0.0.0.0"
    assert shell("live", *words.split())[0] == 0
    assert asked == [
        (([Recipe()],), {"port": None, "open_browser": None, "address": "127.0.0.1", "processes": 1}),
        (
            ([Recipe(steps=5, top_k=1, balance=0.0, domains=("python", "docs"))],),
            {"port": 5010, "open_browser": False, "address": "0.0.0.0", "processes": 1},
        ),
    ]


def test_live_trains_one_or_two_arms_of_a_study(shell, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("workbench.live.serve.live", lambda recipes, **kwargs: asked.append(recipes))
    assert shell("live", "--study", "mixlora")[0] == 0
    words = "--study mixlora --arm mixlora lora-equal --preset smoke --seed 3 --checkpoint-every 5"
    assert shell("live", *words.split())[0] == 0
    arms = [Arm("mixlora", arm, "smoke", 3, 5) for arm in ("mixlora", "lora-equal")]
    assert asked == [[Arm("mixlora", "mixlora", "small", 0)], arms]


def test_live_has_a_flag_for_every_value_of_the_recipe(shell):
    out = shell("live", "--help")[1]
    assert [field.name for field in fields(Recipe) if f"--{field.name.replace('_', '-')} " not in out] == []


def test_view_opens_the_newest_run_or_the_one_that_is_named(shell, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("workbench.live.serve.view", lambda *args, **kwargs: asked.append((args, kwargs)))
    assert shell("view") == shell("view", "mine", "--port", 5010, "--no-browser") == (0, "", "")
    assert asked == [
        (("latest",), {"port": None, "open_browser": None, "address": "127.0.0.1"}),
        (("mine",), {"port": 5010, "open_browser": False, "address": "127.0.0.1"}),
    ]


def test_view_without_any_run_says_what_makes_one(shell, home: Path):
    status, _, err = shell("view")
    assert status == 2 and "there is no run" in err and "workbench live" in err


# -- notebooks


def write_notebook(path: Path, code: str) -> Path:
    import nbformat  # heavy enough for only the process that runs these tests to pay for it
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [
        new_code_cell("seed: int = 0  # 0..9: of everything", metadata={"tags": ["parameters"]}),
        new_code_cell(code),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_the_parameters_of_a_notebook_can_be_listed(shell, tmp_path: Path):
    path = write_notebook(tmp_path / "nb.ipynb", "pass")
    status, out, _ = shell("run", path, "--parameters")
    assert status == 0 and "a whole number of at least 0 and at most 9" in out and "of everything" in out
    assert json.loads(shell("run", path, "--parameters", "--json")[1])["seed"]["default"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-p sed 1", "did you mean 'seed'"),
        ("-p seed 10", "parameter seed is '10' but must be a whole number of at least 0 and at most 9"),
        ("-p seed 1 -p seed 2", "given twice"),
        ("-p seed", "expected 2 arguments"),
    ],
)
def test_a_wrong_parameter_is_told_before_anything_runs(shell, tmp_path: Path, words: str, message: str):
    path = write_notebook(tmp_path / "nb.ipynb", "pass")
    status, _, err = shell("run", path, "-o", tmp_path / "out.ipynb", *words.split())
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.notebook
def test_run_executes_a_notebook_quietly(shell, tmp_path: Path):
    path = write_notebook(tmp_path / "nb.ipynb", "print(seed)")
    output = tmp_path / "out.ipynb"
    assert shell("run", path, "-p", "seed", 4, "-o", output) == (0, f"{output}\n", "")
    assert json.loads(output.read_text())["cells"][-1]["outputs"][0]["text"] == ["4\n"]


@pytest.mark.notebook
def test_a_failing_notebook_is_kept_and_status_1(shell, tmp_path: Path):
    path = write_notebook(tmp_path / "nb.ipynb", "1 / 0")
    output = tmp_path / "out.ipynb"
    status, out, err = shell("run", path, "-o", output, "--json")
    assert status == 1 and output.is_file()
    assert json.loads(out) == {"output": str(output), "error": "In [2]: ZeroDivisionError: division by zero"}
    assert err == f"workbench: {path} failed at In [2]: ZeroDivisionError: division by zero (kept at {output})\n"


@pytest.mark.notebook
def test_ctrl_c_ends_a_notebook_with_one_line_and_130(tmp_path: Path, until):
    code = "print('before', flush=True)\nopen('started', 'w').close()\nimport time; time.sleep(600)"
    path = write_notebook(tmp_path / "nb.ipynb", code)
    command = [sys.executable, "-m", "workbench", "run", str(path), "-o", "out.ipynb"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: (tmp_path / "started").exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everything in the foreground
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "workbench: interrupted: nb is kept at out.ipynb, as far as it came\n")
    kept = notebook.read(tmp_path / "out.ipynb")
    assert "before\n" in [output.get("text") for cell in kept.cells for output in cell.get("outputs", ())]


# -- data and doctor


def test_data_lists_every_set_with_its_licence(shell, home: Path):
    from workbench.lib.data import available

    rows = json.loads(shell("data", "--json")[1])
    assert [row["name"] for row in rows] == [entry.name for entry in available()]
    assert all(row["licence"] for row in rows)
    out = shell("data", "list")[1]
    assert all(row["name"] in out and row["licence"] in out for row in rows)


def test_data_describes_a_set_by_its_manifest(shell, home: Path):
    found = json.loads(shell("data", "describe", "digits", "--json")[1])
    assert found["name"] == "digits" and len(found["parts"]["digits"]["sha256"]) == 64
    assert found["parts"]["digits"]["sha256"] in shell("data", "describe", "digits")[1]


def test_data_get_of_a_set_that_is_there_says_so(shell, home: Path):
    assert shell("data", "get", "digits")[:2] == (0, "digits: here, licence: CC-BY-4.0 (UCI)\n")
    assert [row["name"] for row in json.loads(shell("data", "get", "digits", "python", "--json")[1])] == [
        "python",
        "digits",
    ]


def test_a_fetch_that_is_interrupted_says_what_is_here(shell, home: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.lib.data.fetch.download", interrupted)
    said = "workbench: interrupted: kept: digits; not fetched: abc, phones\n"
    assert shell("data", "get", "digits", "abc", "phones") == (130, "", said)
    assert not list((home / "data").rglob("*.whl")) and not list((home / "data").glob(".get-*"))


@pytest.mark.parametrize(("state", "status"), [(doctor.OK, 0), (doctor.WARN, 0), (doctor.FAIL, 1)])
def test_doctor_fails_only_where_a_check_fails(shell, monkeypatch: pytest.MonkeyPatch, state: str, status: int):
    checks = [
        doctor.Check("python", doctor.OK, "fine", "never shown"),
        doctor.Check("disk", state, "9 GiB", "free some"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    got, out, _ = shell("doctor")
    assert got == status and "never shown" not in out
    assert ("disk: free some" in out) == (state != doctor.OK)
    assert json.loads(shell("doctor", "--json")[1])[1]["state"] == state


# -- what happens around a command


def test_ctrl_c_is_one_line_and_130(shell, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.catalogue.methods", interrupted)
    assert shell("methods") == (130, "", "workbench: interrupted\n")


def test_a_reader_that_goes_away_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", "methods", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_progress_is_silent_where_quiet_is_asked_for(capsys: pytest.CaptureFixture):
    with progress_bar("working") as progress:
        progress(1, 2, "half")
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_plain_line_now_and_then_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr("workbench.cli.progress.time.monotonic", lambda: now[0])
    monkeypatch.delenv("WORKBENCH_QUIET")
    with progress_bar("working") as progress:
        for second, done in ((1, 1), (11, 2), (12, 3), (25, 4)):
            now[0] = 100.0 + second
            progress(done, None if done == 4 else 7, f"row {done}")
    assert capsys.readouterr().err == "working: 2/7 row 2\nworking: 4 row 4\n"


def test_progress_is_a_bar_on_a_terminal():
    """In a pseudo-terminal, as a person sees it; stdout stays clean."""
    import pty

    leader, follower = pty.openpty()
    script = (
        "import time; from workbench.cli.progress import progress_bar\n"
        "with progress_bar('working') as progress:\n    progress(3, 7, 'halfway there'); time.sleep(0.3)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WORKBENCH_QUIET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=follower, env=environment | {"TERM": "xterm"}, check=True
    )
    os.close(follower)
    seen = os.read(leader, 65536).decode()
    os.close(leader)
    assert done.stdout == b"" and "halfway there" in seen and "3/7" in seen


def test_where_prints_folders_that_a_shell_can_use(shell, home: Path):
    places = json.loads(shell("where", "--json")[1])
    assert list(places) == ["notebooks", "apps", "home"] and places["home"] == str(home)
    for what, path in places.items():
        assert shell("where", what)[:2] == (0, f"{path}\n") and path in shell("where")[1]
    assert (Path(places["notebooks"]) / "00_tour.ipynb").is_file() and (Path(places["apps"]) / "live.py").is_file()


def test_results_and_json_are_never_mixed():
    """Every command that a program would read has --json."""
    parsers = build_parser()._subparsers._group_actions[0].choices
    assert {name for name, parser in parsers.items() if "--json" not in parser.format_help()} == {"live", "view"}


def test_the_progress_of_a_run_that_others_make_is_read_from_its_record(
    two_runs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WORKBENCH_QUIET")
    monkeypatch.setattr(progress_module, "SECONDS", 0.0)
    monkeypatch.setattr(progress_module, "LOOK", 0.01)
    said, until = "", time.monotonic() + PATIENCE
    with progress_of(two_runs / "good", "resume good"):
        while "\n" not in said and time.monotonic() < until:
            said += capsys.readouterr().err
    assert said.splitlines()[0].startswith("resume good: 3")
    with progress_of(two_runs / "bad", "resume bad"):  # one that cannot be read says nothing
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
