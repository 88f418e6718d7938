"""No row is paid for twice: rows are kept as they are done, and what is not as it was written is named and not used."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import below, running
from tests.studies import toy
from tests.studies.toy import ARMS, STUDY, ran
from workbench.engines import HERE, Workers
from workbench.errors import InputError
from workbench.studies import gather as gathering
from workbench.studies import kept as keeping
from workbench.studies.rows import Rows
from workbench.studies.sheets import NotUsed

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def files(home: Path) -> list[Path]:
    return sorted(path for path in (home / "results").rglob("*") if path.is_file())


def all_but_time(result) -> dict:
    found = result.to_dict()
    arms = [{key: value for key, value in row.items() if key != "seconds"} for row in found["arms"]]
    return found | {"arms": arms, "seconds": 0, "origin": 0}


def test_a_second_run_runs_nothing_and_says_so(home: Path):
    first, second = STUDY.execute("smoke"), STUDY.execute("smoke")
    assert len(ran()) == 6 and all_but_time(first) == all_but_time(second)
    assert (dict(first.origin), dict(second.origin)) == ({"run": 6}, {"kept": 6})
    assert "Rows: 6 run now." in str(first) and "Rows: 6 kept here by an earlier run." in str(second)
    assert [row.seconds for row in first.rows] == [row.seconds for row in second.rows]
    assert len(files(home)) == 6


def test_a_rule_sees_the_same_of_a_row_that_ran_and_of_one_that_is_kept():
    for _ in range(2):
        row = STUDY.execute("smoke").rows[0]
        assert row.extra["pair"] == [1, 2] and row.extra.keys() == {"pair", "nan", "3"}
        assert math.isnan(row.extra["nan"]) and math.copysign(1, row.extra["3"][0]) == -1


def test_a_preset_may_begin_at_another_seed_than_0():
    later = replace(STUDY, presets={"smoke": STUDY.presets["smoke"] | {"first_seed": 7}})
    first, asked = later.execute("smoke"), later.execute("smoke", seed=0)
    assert [*first.seeds] == [7, 8] and [*asked.seeds] == [0, 1]
    again = STUDY.execute("smoke", seed=7)
    assert dict(again.origin) == {"kept": 6}, "the first seed makes no row another"


def test_more_seeds_run_only_what_is_missing_and_their_interval_is_another():
    few = STUDY.execute("smoke")
    more = STUDY.execute("smoke", seeds=8)
    assert len(ran()) == 24 and dict(more.origin) == {"kept": 6, "run": 18} and more.rows.growing
    assert "8 seeds, valid at every look." in str(more) and "valid" not in str(few)
    assert more.judgement.ci[0] < STUDY.judge(Rows(more.rows), {}).ci[0]  # wider than for a number that was fixed
    again = STUDY.execute("smoke", seeds=2)
    assert not again.rows.growing and all_but_time(again) == all_but_time(few)
    assert STUDY.execute("smoke", seed=1).origin == {"kept": 6} and len(ran()) == 24


def test_fresh_runs_everything_and_replaces_what_was_kept(home: Path):
    STUDY.execute("smoke")
    before = {path: path.stat().st_mtime_ns for path in files(home)}
    assert STUDY.execute("smoke", fresh=True).origin == {"run": 6} and len(ran()) == 12
    assert {path: path.stat().st_mtime_ns for path in files(home)}.keys() == before.keys()
    assert all(path.stat().st_mtime_ns > then for path, then in before.items())


def test_rows_of_other_settings_arms_or_functions_are_others():
    STUDY.execute("smoke")
    assert STUDY.execute("small", workers=HERE).origin == {"run": 6}
    same = replace(STUDY, presets={"full": STUDY.presets["smoke"] | {"seeds": 1}})
    assert same.execute("full", workers=HERE).origin == {
        "kept": 3
    }  # neither the preset's name nor its seeds make a row
    with pytest.warns(NotUsed, match="other code"):
        assert replace(STUDY, run=another).execute("smoke").origin == {"run": 6}


def another(arm, seed, settings):
    return toy.run(arm, seed, settings)


def test_each_row_is_kept_in_two_processes_too(home: Path):
    assert STUDY.execute("smoke", workers=Workers(2)).origin == {"run": 6} and len(files(home)) == 6
    assert STUDY.execute("smoke", workers=Workers(2)).origin == {"kept": 6} and len(ran()) == 6


def start(log: Path, seeds: int, jobs: int = 1, **env: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.studies.toy", str(log), str(seeds), str(jobs)]
    given = os.environ | {key: str(value) for key, value in env.items()}
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True)


def test_a_study_that_was_killed_goes_on_where_it_was_and_leaves_nothing(home: Path, log: Path):
    killed = start(log, 4, TOY_KILL="one-2")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and len(ran()) == 8
    assert [path.suffix for path in files(home)].count(".json") == 7
    assert STUDY.execute("smoke", seeds=4).origin == {"kept": 7, "run": 5}
    assert ran()[8:] == ["one-2", "other-2", *(f"{arm}-3" for arm in ARMS)]
    assert [path.suffix for path in files(home)] == [".json"] * 12


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at the processes of Linux")
def test_the_workers_of_a_study_end_with_it(home: Path, log: Path, until):
    killed = start(log, 4, jobs=2, TOY_SECONDS=600)
    until(lambda: len(ran()) == 2)
    left = below(killed.pid)
    assert len(left) >= 2
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    until(lambda: not any(map(running, left)))
    killed.stdout.close()
    STUDY.execute("smoke")
    assert [path.suffix for path in files(home)] == [".json"] * 6


def test_what_a_kill_has_left_is_cleared_up_by_a_run_that_has_nothing_to_run(home: Path):
    STUDY.execute("smoke")
    folder = files(home)[0].parent
    (folder / "one-9-0123.claim").touch()
    (folder / f".one-9-0123.json.{2**22 + 1}.0123abcd.unfinished").touch()
    STUDY.execute("smoke")
    assert [path.suffix for path in files(home)] == [".json"] * 6


def test_two_processes_share_a_study_and_run_each_row_once(home: Path, log: Path):
    both = [start(log, 4, TOY_SECONDS=0.3) for _ in range(2)]
    origins = [json.loads(process.communicate()[0]) for process in both]
    assert sorted(ran()) == sorted(f"{arm}-{seed}" for arm in ARMS for seed in range(4))
    assert sum(origin.get("run", 0) for origin in origins) == 12
    assert sum(sum(origin.values()) for origin in origins) == 24
    assert [path.suffix for path in files(home)] == [".json"] * 12


def test_who_waits_for_a_claim_gets_the_row_and_the_claim_of_a_killed_process_holds_nobody(home: Path, log: Path):
    holder = start(log, 2, TOY_SECONDS=30)
    while not ran():
        time.sleep(0.02)
    holder.kill()
    holder.communicate()
    assert STUDY.execute("smoke").origin == {"run": 6}
    assert [path.suffix for path in files(home)] == [".json"] * 6


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"metric": 2', '"metric": 3'))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_row(path: Path) -> None:
    path.write_bytes(next(path.parent.glob("method-1-*")).read_bytes())


def no_json_of_ours(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("spoil", [edited, cut, emptied, of_another_row, no_json_of_ours])
def test_a_file_that_is_not_as_it_was_written_is_named_and_run_again(home: Path, spoil):
    first = STUDY.execute("smoke")
    (path,) = (home / "results").rglob("method-0-*")
    was = path.read_text()
    spoil(path)
    assert path.read_text() != was
    with pytest.warns(NotUsed, match=rf"{path}.*not used"):
        second = STUDY.execute("smoke")
    assert ran()[6:] == ["method-0"] and all_but_time(first) == all_but_time(second)
    assert STUDY.execute("smoke").origin == {"kept": 6}


def test_rows_of_other_code_are_named_and_not_used(home: Path, monkeypatch: pytest.MonkeyPatch):
    STUDY.execute("smoke")
    monkeypatch.setattr(keeping, "code_of", lambda run: "another")
    with pytest.warns(NotUsed, match="other code than today's made 6 of the kept rows of toy, .*; not used"):
        assert STUDY.execute("smoke").origin == {"run": 6}
    assert STUDY.execute("smoke").origin == {"kept": 6}  # and no more is said: nothing is missing
    (path,) = (home / "results" / "toy" / "another").glob("one-0-*")
    old = next(found for found in (home / "results").rglob(path.name) if found != path)
    path.write_bytes(old.read_bytes())
    with pytest.warns(NotUsed, match="other code"), pytest.warns(NotUsed, match="not the row that its name says"):
        assert STUDY.execute("smoke").origin == {"kept": 5, "run": 1}


def test_code_is_all_that_a_study_stands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    was = keeping.code_of(toy.run)
    assert was == keeping.code_of(toy.run) and was != keeping.code_of(another)
    below = tmp_path / "below.py"
    below.write_text("x = 1")
    monkeypatch.setattr(keeping, "files_below", lambda source: [below])
    monkeypatch.setattr(keeping, "PACKAGE", tmp_path)
    one = keeping.code_of(toy.run)
    below.write_text("x = 2")
    two = keeping.code_of(toy.run)
    monkeypatch.setattr(keeping.torch, "__version__", "0.0")
    assert len({was, one, two, keeping.code_of(toy.run)}) == 4
    namespace: dict = {}
    exec("def run(arm, seed, settings): ...", namespace)
    with pytest.raises(InputError, match="run is run but must be a function of a file"):
        keeping.code_of(namespace["run"])


def test_a_folder_that_cannot_be_written_costs_no_result(home: Path):
    home.mkdir(exist_ok=True)
    (home / "results").write_text("in the way")
    with pytest.warns(NotUsed, match="cannot be written, the row is not kept"):
        assert STUDY.execute("smoke").origin == {"run": 6}


def test_what_is_asked_for_is_checked_before_anything_runs():
    for seeds in (1, 0, 1001):
        with pytest.raises(InputError, match=rf"seeds is {seeds} but must be from 2, as smoke has, to 1000"):
            STUDY.execute("smoke", seeds=seeds)
    with pytest.raises(InputError, match="seed is 2147483647"):
        STUDY.execute("smoke", seed=2**31 - 1)
    assert ran() == []


def test_progress_counts_what_is_there():
    STUDY.execute("smoke")
    seen = []
    STUDY.execute("smoke", seeds=3, progress=lambda *event: seen.append(event))
    assert [event[:2] for event in seen] == [(6, 9), (7, 9), (8, 9), (9, 9)] and seen[0][2] == "6 are there"


def test_what_ran_before_an_interrupt_is_kept(monkeypatch: pytest.MonkeyPatch):
    usual = gathering._timed

    def interrupted(run, arm, seed, settings):
        if (arm, seed) == ("one", 1):
            raise KeyboardInterrupt
        return usual(run, arm, seed, settings)

    monkeypatch.setattr(gathering, "_timed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STUDY.execute("smoke")
    monkeypatch.setattr(gathering, "_timed", usual)
    assert STUDY.execute("smoke").origin == {"kept": 4, "run": 2}
