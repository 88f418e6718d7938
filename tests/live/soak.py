"""A long look at one server: a run that trains, three browsers that stay, and many sessions that come and go.

    python -m tests.live.soak --minutes 30 --sessions 100

prints, for every tenth session, the server's memory (RSS, MiB) and open files, and ends with 0 where memory after the
first 30 sessions stays within 5 % of what it was then, and the number of open files within the browsers' own few.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.live.test_serve import ADDRESS, Program, get
from workbench.doctor import find_browser

VIEWERS = 3
SETTLED = 30  # sessions, after which nothing may grow
GROWTH = 0.05
FILES = 8  # that may be open at the moment of looking, and not at another


async def session(port: int, query: str, seconds: float) -> int:
    """A page, and what its websocket brings for some seconds: the number of messages."""
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    status, text = await asyncio.to_thread(get, port, f"/live?{query}")
    assert status == 200, status
    token = re.search(r'"token":"([^"]+)"', text)[1]
    address = HTTPRequest(f"ws://localhost:{port}/live/ws", headers={"Origin": f"http://localhost:{port}"})
    socket = await websocket_connect(address, subprotocols=["bokeh", token])
    for _ in ("header", "metadata", "content"):  # it greets first
        await socket.read_message()
    for part in ('{"msgid": "1", "msgtype": "PULL-DOC-REQ"}', "{}", "{}"):
        await socket.write_message(part)
    heard, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            if await asyncio.wait_for(socket.read_message(), left) is None:
                raise AssertionError(f"the server closed the session: {socket.close_code} {socket.close_reason}")
        except TimeoutError:
            break
        heard += 1
    socket.close()
    return heard


def state(process: int) -> tuple[float, int]:
    """Memory in MiB and open files of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{process}/fd"))


async def soak(port: int, query: str, process: int, minutes: float, sessions: int) -> list[tuple[float, int]]:
    from playwright.async_api import async_playwright

    seen = []
    async with async_playwright() as play:
        browser = await play.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for _ in range(VIEWERS):
            page = await browser.new_page()
            await page.goto(f"http://localhost:{port}/live?{query}")
        for done in range(sessions):
            heard = await session(port, query, minutes * 60 / sessions)
            seen.append(state(process))
            if not (done + 1) % 10:
                mib, files = seen[-1]
                print(f"{done + 1:4d} sessions: {mib:7.1f} MiB, {files} files, {heard} messages", flush=True)
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
            query = f"run={found[2]}"
            seen = asyncio.run(soak(int(found[1]), query, program.process.pid, args.minutes, args.sessions))
        finally:
            program.end()
    begun, end = seen[min(SETTLED, len(seen) - 1)], seen[-1]
    grown, more = end[0] / begun[0] - 1, end[1] - begun[1]
    print(f"after {SETTLED} sessions {begun[0]:.1f} MiB, {begun[1]} files; at the end {grown:+.1%}, {more:+d} files")
    return int(grown > GROWTH or more > FILES)


if __name__ == "__main__":
    sys.exit(main())
