"""What Linux says of processes, for tests that look for what is left of them."""

from pathlib import Path


def running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that has, and whom nobody has asked how, is not."""
    state, _ = _stat(pid)
    return state not in "ZX"


def below(pid: int) -> set[int]:
    """The processes that a process has started, and those that these have."""
    all_there = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    children = {one for one in all_there if _stat(one)[1] == pid}
    return children.union(*map(below, children))


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; "X", dead, of one that is not there."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return state, int(parent)
