"""Native EventSources: a real browser's and npm's `eventsource`, over a network that fails and a server that dies.

They connect again by themselves, with the last id that they saw, so what they have in the end must be the task's
log: in order, without a gap, without a duplicate.
"""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from playwright.async_api import Page, async_playwright

from tests.system.conftest import KEY, Api, Server, history, proxy, submit
from tests.waiting import wait_until

CHROMIUM = shutil.which("chromium")
NODE = Path(__file__).parent / "node"
ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = [
    *("DATA_PROCESSING", "WORKFLOW_STARTED", "PROGRESS", "AGENT_STARTED", "AGENT_COMPLETED", "WORKFLOW_COMPLETED"),
    *("thread.message.delta", "thread.message.completed", "gap", "done"),
]

QUERY = "What does an EventSource do when its connection breaks, and what must the server do then?"
CUTS = (0, 1000, 5000)
"""Bytes that get through: nothing at all; the headers, and not yet an event; a part of the events."""
STEPS, STEP_MS = 80, 100
"""A task that outlasts the pauses between the connections, of three seconds each."""

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
needs_eventsource = pytest.mark.skipif(
    not shutil.which("node") or not (NODE / "node_modules" / "eventsource").is_dir(),
    reason="node, or eventsource in tests/system/node, is not installed",
)


async def long_task(http: httpx.AsyncClient) -> str:
    return await submit(http, QUERY, context={"echo": {"steps": STEPS, "delay_ms": STEP_MS}})


async def expected(http: httpx.AsyncClient, id_: str) -> list[tuple[str, int]]:
    return [(event["stream_id"], event["seq"]) for event in await history(http, id_)]


@asynccontextmanager
async def browser_page(url: str, id_: str) -> AsyncIterator[Page]:
    """Our own page, which follows one task."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        try:
            page = await browser.new_page()
            await page.goto(f"{url}/?{urlencode({'task': id_, 'key': KEY})}")
            yield page
        finally:
            await browser.close()


async def shown(page: Page) -> list[tuple[str, int]]:
    """Each event's id and number, in the page's order."""
    script = "[...document.querySelectorAll('#events li')].map(li => [li.id, JSON.parse(li.title).seq])"
    return [(id_, seq) for id_, seq in await page.evaluate(script)]


async def shows_the_end(page: Page) -> bool:
    return bool(await page.text_content("#status") == "done")


class Follower:
    """npm's `eventsource` in a process of its own."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.process: asyncio.subprocess.Process

    @property
    def events(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "type" in line]

    @property
    def places(self) -> list[tuple[str, int]]:
        return [(event["id"], json.loads(event["data"])["seq"]) for event in self.events if event["type"] != "done"]

    async def read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))


@asynccontextmanager
async def follower(url: str, id_: str) -> AsyncIterator[Follower]:
    made = Follower()
    query = urlencode({"workflow_id": id_, "api_key": KEY})
    made.process = await asyncio.create_subprocess_exec(
        *("node", "follow.mjs", f"{url}/api/v1/stream/sse?{query}", *NAMES),
        stdout=asyncio.subprocess.PIPE,
        cwd=NODE,
    )
    reading = asyncio.create_task(made.read())
    try:
        yield made
    finally:
        if made.process.returncode is None:
            made.process.kill()
        await made.process.wait()
        await reading


@needs_chromium
async def test_a_browser_loses_its_connection_and_no_event(http: httpx.AsyncClient, server: Server) -> None:
    id_ = await long_task(http)
    async with proxy(server.port, CUTS) as network, browser_page(network.url, id_) as page:
        await wait_until(lambda: shows_the_end(page), "the page shows the end", seconds_max=40)
        assert network.cut == len(CUTS)
        assert await shown(page) == await expected(http, id_)
        assert await page.text_content("#text") == QUERY


@needs_chromium
async def test_the_readmes_lines_for_a_browser_show_the_text(http: httpx.AsyncClient, server: Server) -> None:
    id_ = await submit(http, QUERY)
    (snippet,) = re.findall(
        r"```js\n(const stream .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    script = f"""async ([id, key]) => {{
        const shown = [], show = (text) => shown.push(text)
        {snippet}
        await new Promise((ended) => stream.addEventListener("done", ended))
        return shown.join("")
    }}"""
    async with browser_page(server.url, id_) as page:
        assert await page.evaluate(script, [id_, KEY]) == QUERY


@needs_eventsource
async def test_npms_eventsource_loses_its_connection_and_no_event(http: httpx.AsyncClient, server: Server) -> None:
    id_ = await long_task(http)
    async with proxy(server.port, CUTS) as network, follower(network.url, id_) as node:
        # 204 is the only answer that stops it (HTML standard): it ends by itself.
        assert await asyncio.wait_for(node.process.wait(), 40) == 0
        await wait_until(lambda: "closed" in node.lines[-1], "all that it wrote was read")
        assert network.cut == len(CUTS)
    assert node.places == await expected(http, id_)
    assert node.events[-1]["type"] == "done"
    assert node.lines[-1] == {"trouble": node.lines[-1]["trouble"], "code": 204, "closed": True}


@needs_chromium
@needs_eventsource
@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_server_that_goes_comes_back_and_no_event_is_lost(http: httpx.AsyncClient, api: Api, end: str) -> None:
    id_ = await long_task(http)
    async with follower(api.url, id_) as node, browser_page(api.url, id_) as page:

        async def both_are_in_the_middle() -> bool:
            return len(node.events) > 10 and len(await shown(page)) > 10

        await wait_until(both_are_in_the_middle, "both clients are in the middle of the task")
        await asyncio.to_thread(getattr(api, end))
        await asyncio.to_thread(api.start)
        await wait_until(lambda: shows_the_end(page), "the page shows the end", seconds_max=40)
        await wait_until(lambda: node.events[-1]["type"] == "done", "npm's eventsource is told the end")
        assert await shown(page) == node.places == await expected(http, id_)
        assert any("trouble" in line for line in node.lines), "it was cut off"


@needs_chromium
async def test_the_end_stops_a_browsers_eventsource_that_nobody_closes(http: httpx.AsyncClient, server: Server) -> None:
    """It connects again after every end; the answer to `<last id>.end` is 204, which makes it give up."""
    id_ = await submit(http, QUERY)
    async with browser_page(server.url, id_) as page:
        url = "/api/v1/stream/sse?" + urlencode({"workflow_id": id_, "api_key": KEY})
        await page.evaluate(
            """url => {
                window.left = new EventSource(url), window.ends = []
                window.left.addEventListener("done", (event) => window.ends.push(event.lastEventId))
            }""",
            url,
        )
        await page.wait_for_function("window.ends.length > 0 && window.left.readyState === EventSource.CLOSED")
        last, _ = (await expected(http, id_))[-1]
        assert await page.evaluate("window.ends") == [f"{last}.end"]
