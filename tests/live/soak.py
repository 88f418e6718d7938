"""A long look at one server: a run that trains, three pages that stay, and many sessions that come and go.

    python -m tests.live.soak --minutes 30 --sessions 100

prints, for every tenth session, the server's memory (RSS, MiB) and open files, and ends with 0 where memory after the
first 30 sessions stays within 5 % of what it was then, and the number of open files within the browsers' own few.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.live.test_serve import ADDRESS, Program
from workbench.doctor import find_browser

VIEWERS = 3
SETTLED = 30  # sessions, after which nothing may grow
GROWTH = 0.05
FILES = 8  # that may be open at the moment of looking, and not at another


def state(process: int) -> tuple[float, int]:
    """Memory in MiB and open files of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{process}/fd"))


async def soak(address: str, process: int, minutes: float, sessions: int) -> list[tuple[float, int]]:
    from playwright.async_api import async_playwright

    seen = []
    async with async_playwright() as play:
        browser = await play.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for _ in range(VIEWERS):
            await (await browser.new_page()).goto(address)
        for done in range(sessions):
            page = await browser.new_page()
            await page.goto(address)
            await page.get_by_text("steps/s").wait_for()
            await page.wait_for_timeout(minutes * 60_000 / sessions)
            await page.close()
            seen.append(state(process))
            if not (done + 1) % 10:
                mib, files = seen[-1]
                print(f"{done + 1:4d} sessions: {mib:7.1f} MiB, {files} files", flush=True)
        await browser.close()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.live.soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sessions", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["WORKBENCH_HOME"] = home
        program = Program("-m", "workbench", "live", "--no-browser", "--steps", "10000000", "--threads", "1")
        try:
            found = program.wait_for(ADDRESS)
            address = f"http://localhost:{found[1]}/live?run={found[2]}"
            seen = asyncio.run(soak(address, program.process.pid, args.minutes, args.sessions))
        finally:
            program.end()
    begun, end = seen[min(SETTLED, len(seen) - 1)], seen[-1]
    grown, more = end[0] / begun[0] - 1, end[1] - begun[1]
    print(f"after {SETTLED} sessions {begun[0]:.1f} MiB, {begun[1]} files; at the end {grown:+.1%}, {more:+d} files")
    return int(grown > GROWTH or more > FILES)


if __name__ == "__main__":
    sys.exit(main())
