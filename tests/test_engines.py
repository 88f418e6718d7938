"""Where work is done makes no difference to what is made: the same bits, one thread, and a death costs one call."""

import os
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import PATIENCE
from tests.processes import below
from workbench import engines
from workbench.engines import ENGINES, HERE, Crew, Workers
from workbench.errors import InputError, WorkerLostError

BEFORE: set[int] = set()
"""Processes that were there before the workers."""


@pytest.fixture(scope="module", params=ENGINES)
def crew(request) -> Iterator[Crew]:
    """Two workers of each engine, a real cluster on this machine for those that have one; started once, for all."""
    if request.param == "ray":
        __import__("ray").shutdown()  # a cluster that is there would be taken, and stay
    BEFORE.clear()
    BEFORE.update(below(os.getpid()))
    with Workers(2, request.param).open(pieces=8) as crew:
        yield crew


def square(number: int) -> int:
    return number**2


def surroundings(seed: int) -> dict[str, object]:
    """What a call finds around it, and numbers that depend on it."""
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_info

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 300, generator=generator)
    nested = Parallel(2)(delayed(os.getpid)() for _ in range(3))
    return {
        "threads": {pool["num_threads"] for pool in threadpool_info()},
        "nested in other processes": set(nested) != {os.getpid()},
        "sum": float((x @ x).sum()),
        "eigen": torch.linalg.eigvalsh(x @ x.T)[-1].item(),
    }


def die_once(mark: str, number: int) -> int:
    """Ends its process the first time that it is called with 3."""
    if number == 3 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    with open(mark + "-calls", "a") as log:
        log.write(f"{number}\n")
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    if number == 3:
        raise InputError("number is 3 but must be another")
    time.sleep(0.05)
    return number


def blocked(_: int) -> int:
    """Bits of the signals that this process does not hear, as the kernel knows them."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigBlk"))
    return int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1


def each(crew: Crew, function, numbers=range(8)) -> dict[int, object]:
    return {number: made for (number,), made in crew.each(lambda n: crew.call(function, n), [(n,) for n in numbers])}


def test_all_pieces_are_made_and_each_is_told_as_it_is_done(crew: Crew):
    assert each(crew, square) == {number: number**2 for number in range(8)}


def test_a_call_has_one_thread_no_helpers_and_the_same_bits_wherever_it_is_made(crew: Crew):
    with HERE.open(pieces=1) as here:
        expected = here.call(surroundings, 5)
    assert expected["threads"] == {1} and not expected["nested in other processes"]
    assert crew.call(surroundings, 5) == expected


def test_a_worker_of_dask_does_not_hear_what_a_terminal_tells_all_processes(crew: Crew):
    """It would print where it was; who started it hears Ctrl-C, and ends it. That of loky ends without a word."""
    if isinstance(crew.engine, engines.Dask):
        assert crew.call(blocked, 0) == 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_worker_that_dies_costs_the_call_that_it_made_and_no_other(crew: Crew, tmp_path: Path):
    mark = str(tmp_path / "mark")
    numbers = range(8)
    made = {n: value for (n,), value in crew.each(lambda n: crew.call(die_once, mark, n), [(n,) for n in numbers])}
    assert made == {number: number for number in numbers}
    calls = Path(mark + "-calls").read_text().split()
    assert sorted(calls) == sorted(map(str, numbers)), "no call but the one of the dead worker was made again"


def test_what_kills_each_worker_is_named_and_the_others_are_made(crew: Crew):
    seen = []
    with pytest.raises(WorkerLostError, match=f"^3: the worker died {engines.ATTEMPTS} times"):
        for (number,), _ in crew.each(lambda n: crew.call(die, n), [(n,) for n in range(5)]):
            seen.append(number)
    assert sorted(seen) == [0, 1, 2, 4]


def test_left_in_the_middle_the_workers_end_and_leave_no_process(crew: Crew):
    """The last test of a crew, for it ends it."""
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in crew.each(lambda seconds: crew.call(time.sleep, seconds), [(0.0,), (3000.0,), (3000.0,)]):
            raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="the workers have ended"):
        crew.call(square, 3)
    while left(BEFORE) and time.monotonic() - began < PATIENCE:
        time.sleep(0.1)
    assert left(BEFORE) == set()


def test_an_error_ends_all_of_it():
    with pytest.raises(InputError, match="number is 3"), Workers(2).open(pieces=40) as crew:
        each(crew, fail, range(40))


def left(before: set[int]) -> set[int]:
    """Processes that were not there before. Python's own tracker of what they share stays, and ends with this one."""
    new = {pid: Path(f"/proc/{pid}/cmdline") for pid in below(os.getpid()) - before}
    return {pid for pid, path in new.items() if path.exists() and b"resource_tracker" not in path.read_bytes()}


@pytest.mark.parametrize("pieces", [0, 1])
def test_without_much_to_do_nobody_is_started(pieces: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ENGINES, "loky", None)
    with Workers(4).open(pieces) as crew:
        assert each(crew, square, range(pieces)) == {number: number**2 for number in range(pieces)}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (("loki",), "engine 'loki' is unknown; did you mean 'loky'"),
        (("loky", "tcp://head:1"), "engine loky is this machine"),
        (("dask", "head"), "address is 'head' but must be"),
        (("dask", "tcp://127.0.0.1:1"), "nobody answers there"),
        (("dask", "tcp://127.0.0.1:700000"), "must be"),
        (("ray", "head"), "address is 'head' but must be"),
        (("ray", "127.0.0.1:1"), "nobody answers there"),
    ],
)
def test_an_engine_or_an_address_that_is_none_is_refused_at_once(wanted: tuple[str, ...], said: str):
    began = time.monotonic()
    with pytest.raises(InputError, match=said), Workers(2, *wanted).open(pieces=2):
        pass
    assert time.monotonic() - began < PATIENCE


def test_a_cluster_that_is_there_is_taken_and_has_to_have_the_same_workbench():
    from dask.distributed import LocalCluster

    there = LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0")
    with there as cluster, Workers(None, "dask", cluster.scheduler_address).open(pieces=9) as crew:
        assert crew.engine.size == 2 and crew.code == engines.code()
        assert each(crew, square) == {number: number**2 for number in range(8)}
        with pytest.raises(InputError, match="another workbench, Python or torch"):
            Crew(crew.engine, "of another").call(square, 3)
        assert crew.call(blocked, 3) == 0, "a cluster of others hears what it did"
        (worker,) = cluster.scheduler_info["workers"]
        wrong = Workers(None, "dask", worker).open(pieces=2)
        with pytest.raises(InputError, match="must be that of a scheduler of Dask: a Worker answers"), wrong:
            pass
        with pytest.raises(InputError, match="number is 3"):  # an error ends all of it
            each(crew, fail, range(40))


def test_a_cluster_without_workers_is_refused():
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        wanted = Workers(None, "dask", cluster.scheduler_address)
        with pytest.raises(InputError, match="has no workers"), wanted.open(pieces=2):
            pass


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad request\r\n\r\n"], ids=["silent", "web"])
@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_another_service_is_refused_and_nothing_waits_for_it(
    engine: str, answer: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engines, "PATIENCE", 1.0)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Service) as service:
        service.answer, service.ended = answer, threading.Event()
        threading.Thread(target=service.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{service.server_address[1]}"
        began, wrong = time.monotonic(), Workers(2, engine, address).open(pieces=2)
        with pytest.raises(InputError, match=f"{address}' but no .* answers there"), wrong:
            pass
        assert time.monotonic() - began < PATIENCE
        service.ended.set()
        service.shutdown()


class Service(socketserver.BaseRequestHandler):
    """Says its answer to whoever comes, and hangs on."""

    def handle(self) -> None:
        self.request.sendall(self.server.answer)
        self.server.ended.wait(PATIENCE)


def test_a_cluster_of_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(__import__("ray"), "init", fails)
    said = "engine is 'ray' but no cluster starts on this machine: The current node timed out"
    with pytest.raises(InputError, match=said), Workers(2, "ray").open(pieces=2):
        pass


def test_no_jobs_are_refused():
    with pytest.raises(InputError, match="jobs is 0 but must be at least 1"):
        Workers(0)


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_missing_package_is_named_with_how_to_get_it(engine: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, engine, None)
    said = rf"engine {engine} needs .*pip install 'workbench\[engines\]'"
    with pytest.raises(InputError, match=said), Workers(2, engine).open(pieces=2):
        pass
