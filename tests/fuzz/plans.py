"""Plans, indices and sizes that point nowhere, to every operator and every path for a processor: 1,000 calls.

The calls are those of the sanitizer's run, see `workbench.kernels.native.cases`. Each is made in a process of its own,
so that one that ends it is a fault like others. What must hold: a sound call comes back, another is refused in words,
unless its argument was as good as the right one.
"""

import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from tests.fuzz.harness import Case
from workbench.errors import InputError
from workbench.kernels.native.cases import Call, calls

CALLS = 1000
SECONDS = 20  # of processor time
REFUSED = 3


def cases(folder: Path, seed: int) -> Iterator[Case]:
    for number, call in enumerate(islice(calls(seed), CALLS)):

        def wrong(came_back: bool, call: Call = call, sound: bool = number % 2 == 0) -> str | None:
            if sound and not came_back:
                return "a sound call is refused"
            return "it is taken" if call.refused and came_back else None

        yield Case("plans", call.name, partial(apart, call), wrong)


def apart(call: Call) -> None:
    """The call in a child; what comes of it comes of this.

    Raises:
        RuntimeError: the child failed in another way than by an `InputError`, or did not end.
    """
    said, says = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # in C no handler of Python's would be called
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        status = 1
        try:
            call()
            status = 0
        except InputError as error:
            status = REFUSED
            os.write(says, str(error).encode()[:1000])
        except BaseException as error:
            os.write(says, f"{type(error).__name__}: {error}".encode()[:1000])
        finally:
            os._exit(status)
    os.close(says)
    with os.fdopen(said, errors="replace") as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == REFUSED:
        raise InputError(text)
    if status:
        raise RuntimeError(text if status > 0 else f"it ended by {signal.Signals(-status).name}")
