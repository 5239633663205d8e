"""The edge: shapes of errors, headers that every answer has, health and metrics, and how a process starts and stops."""

import asyncio
import contextlib
import itertools
import json
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import structlog
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import __version__, errors, events, metrics, protocol, server
from app.api import shannon
from app.edge import BODY_BYTES_MAX, Bounded, respond
from app.errors import Full, Misconfigured, Stale, Unavailable
from app.identity import DEVELOPMENT_KEY
from app.server import listen, url_of
from app.settings import Settings
from app.store import Store
from tests.api.serving import KEY, ORG, Served, ended, served, started, submit
from tests.waiting import wait_until


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


@pytest.fixture
async def running(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as made:
        yield made


# Errors


async def test_an_unknown_path_is_json(running: Served) -> None:
    for path in ("/nowhere", "/api/v1/schedules", "/v1/chat/completions", "/api/v1/tasks/x/stream/"):
        answer = await running.client.get(path)
        assert answer.status_code == 404
        word = "detail" if path.startswith("/v1/") else "error"
        assert answer.json() == {word: f"Not found: {path}"}


async def test_a_wrong_method_is_json_and_names_the_right_ones(running: Served) -> None:
    answer = await running.client.put("/api/v1/tasks", json={})
    assert answer.status_code == 405
    assert answer.json() == {"error": "Method not allowed"}
    assert set(answer.headers["allow"].split(", ")) & {"GET", "POST"}
    assert (await running.client.post("/api/v1/stream/sse")).status_code == 405


async def test_a_body_beyond_the_bound_is_refused_with_a_sentence(running: Served) -> None:
    async def dribble() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000

    for content in (b"x" * (BODY_BYTES_MAX + 1), dribble()):
        answer = await running.client.post("/api/v1/tasks", content=content)
        assert answer.status_code == 413
        assert "bytes" in answer.json()["error"]
    assert (await running.client.get("/health")).status_code == 200


async def test_the_size_is_bounded_for_routes_that_read_whatever_comes() -> None:
    """Without an announced length the bound counts what arrives."""

    async def app(_: Any, receive: Any, __: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 300_000, "more_body": True}

    async def send(_: Any) -> None:
        raise AssertionError("nothing is sent")

    with pytest.raises(errors.TooLarge):
        await Bounded(app)({"type": "http", "headers": []}, receive, send)


async def test_what_nobody_foresaw_is_a_500_that_tells_nothing(store: Store, settings: Settings) -> None:
    async def fault(_: Request) -> Response:
        raise ZeroDivisionError("secret of the inside")

    async with served(store, settings) as made:
        app = made.server.config.app
        app.router.routes.append(Route("/fault", fault))  # type: ignore[union-attr]
        with structlog.testing.capture_logs() as lines:
            answer = await made.client.get("/fault", headers={"X-Request-ID": "abc"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "Internal server error"}
    assert answer.headers["x-trace-id"] == "abc"
    assert answer.headers["access-control-allow-origin"] == "*"
    (line,) = [line for line in lines if line["event"] == "request.failed"]
    assert line["trace_id"] == "abc"
    assert line["exc_info"]


async def test_a_full_store_takes_nothing_more_says_why_and_is_still_read(store: Store, running: Served) -> None:
    task = await ended(store)
    await store.door.call("CONFIG", "SET", "maxmemory", "1")
    answer = await running.client.post("/api/v1/tasks", json={"query": "q"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert "full" in answer.json()["error"]
    assert (await running.client.get(f"/api/v1/tasks/{task}")).status_code == 200
    assert "[DONE]" in (await running.client.get(f"/api/v1/tasks/{task}/stream")).text
    assert (await running.client.delete(f"/api/v1/tasks/{task}")).status_code == 204


async def test_data_of_another_format_is_one_clear_sentence(
    store: Store, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    await store.door.call("HSET", "tc:deployment", "format", "0")
    command = (sys.executable, "-m", "app.cli", "verify", "--data", str(settings.data))
    process = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2])
    assert await process.wait() == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "The store's data has format 0; this version of Taskcast reads format 4."


@pytest.mark.parametrize(("error", "seconds"), [(Unavailable("gone"), "1"), (Full("no room"), "30")])
async def test_a_store_that_cannot_answer_is_503_with_the_time_to_wait(
    store: Store, running: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, seconds: str
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(store, "submit", fail)
    answer = await running.client.post("/api/v1/tasks", json={"query": "q"})
    assert answer.status_code == 503
    assert answer.json()["error"]
    assert answer.headers["retry-after"] == seconds


def test_every_error_has_an_answer() -> None:
    def leaves(kind: type[errors.TaskcastError]) -> list[type[errors.TaskcastError]]:
        return [kind, *(leaf for sub in kind.__subclasses__() for leaf in leaves(sub))]

    # A dialect's own are made by it alone.
    kinds = [kind for kind in leaves(errors.TaskcastError) if kind.__module__ == errors.__name__]
    for kind, (path, word) in itertools.product(
        kinds, {"/": "error", "/worker/v1/x": "error", "/v1/x": "detail"}.items()
    ):
        answer = respond(kind("why"), path)
        assert 400 <= answer.status_code < 600
        assert json.loads(bytes(answer.body))[word]


async def test_a_stale_refusal_is_counted(store: Store, running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stale(*_: Any, **__: Any) -> None:
        raise Stale("This attempt is over.", "running")

    before = await number(running, "taskcast_stale_refusals_total")
    task = await submit(store)
    monkeypatch.setattr(store, "get", stale)
    assert (await running.client.get(f"/api/v1/tasks/{task}")).status_code == 409
    assert await number(running, "taskcast_stale_refusals_total") == before + 1


# Headers


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        (
            {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
            "0af7651916cd43dd8448eb211c80319c",
        ),
        (
            {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Trace-ID": "mine"},
            "0af7651916cd43dd8448eb211c80319c",
        ),
        ({"X-Trace-ID": "mine", "X-Request-ID": "other"}, "mine"),
        ({"X-Request-ID": "other"}, "other"),
        ({"traceparent": "broken", "X-Request-ID": "other"}, "other"),
    ],
)
async def test_a_requests_trace_id_comes_back(running: Served, headers: dict[str, str], trace: str) -> None:
    answer = await running.client.get("/health", headers=headers)
    assert answer.headers["x-trace-id"] == trace
    assert len(answer.headers["x-span-id"]) == 16


async def test_a_request_without_a_trace_id_gets_one(running: Served) -> None:
    first, second = [(await running.client.get("/nowhere")).headers["x-trace-id"] for _ in range(2)]
    assert len(first) == 32
    assert first != second


@pytest.mark.parametrize("nasty", ["a b", "x" * 200, "é", "<script>"])
async def test_a_trace_id_that_is_none_is_not_echoed(running: Served, nasty: str) -> None:
    answer = await running.client.get("/health", headers={b"X-Trace-ID": nasty.encode("latin-1")})
    assert len(answer.headers["x-trace-id"]) == 32


async def test_any_page_may_read_every_answer_and_its_headers(running: Served) -> None:
    for path in ("/health", "/nowhere", "/api/v1/tasks", "/api/v1/tasks/task_none"):
        answer = await running.client.get(path, headers={"Origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        exposed = answer.headers["access-control-expose-headers"]
        assert all(name in exposed for name in ("X-Workflow-ID", "ETag", "X-Session-ID", "X-Trace-ID", "Retry-After"))
    unauthorized = await running.client.get("/api/v1/tasks", headers={"X-API-Key": "wrong"})
    assert unauthorized.status_code == 401
    assert unauthorized.headers["access-control-allow-origin"] == "*"


async def test_every_preflight_is_200(running: Served) -> None:
    for path, methods in (
        ("/api/v1/tasks", "GET, POST, PUT, PATCH, DELETE, OPTIONS"),
        ("/nowhere", "GET, POST, PUT, PATCH, DELETE, OPTIONS"),
        ("/api/v1/stream/sse", "GET, OPTIONS"),
        ("/api/v1/tasks/task_1/stream", "GET, OPTIONS"),
    ):
        answer = await running.client.options(path, headers={"X-API-Key": ""})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-methods"] == methods
        assert "Last-Event-ID" in answer.headers["access-control-allow-headers"]
        assert "X-API-Key" in answer.headers["access-control-allow-headers"]
        assert answer.headers["access-control-max-age"] == "3600"


# Logs


async def test_each_request_is_one_line_without_its_query(
    running: Served, store: Store, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    task = await ended(store)
    with structlog.testing.capture_logs() as lines:
        async with httpx.AsyncClient(base_url=running.url) as client:
            await client.get(f"/api/v1/stream/sse?workflow_id={task}&api_key={DEVELOPMENT_KEY}")
            await client.get(f"/api/v1/tasks?token={DEVELOPMENT_KEY}")
            await client.get(
                f"/api/v1/stream/ws?workflow_id={task}&token={DEVELOPMENT_KEY}",
                headers={
                    "Connection": "upgrade",
                    "Upgrade": "websocket",
                    "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
                    "Sec-WebSocket-Version": "13",
                },
            )
    answered = [line for line in lines if line["event"] == "request.answered"]
    assert [(line["path"], line["status"]) for line in answered][:2] == [
        ("/api/v1/stream/sse", 200),
        ("/api/v1/tasks", 401),
    ]
    out, err = capfd.readouterr()
    told = f"{lines} {[record.getMessage() for record in caplog.records if record.name != 'httpx']} {out} {err}"
    assert "WebSocket" in told  # uvicorn logs these itself
    assert DEVELOPMENT_KEY not in told


# Operations


async def number(running: Served, name: str, **labels: str) -> float:
    text = (await running.client.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return 0.0


async def test_health_asks_nobody(running: Served) -> None:
    answer = await running.client.get("/health")
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("time").startswith("20")
    assert body == {"status": "healthy", "version": __version__, "checks": {"gateway": "ok"}}


async def test_readiness_is_the_stores(store: Store, running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = await running.client.get("/readiness")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")

    async def gone() -> None:
        raise Unavailable("gone")

    monkeypatch.setattr(store, "ping", gone)
    answer = await running.client.get("/readiness")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert answer.json()["checks"] == {"gateway": "ok", "store": "unavailable"}


async def test_metrics_tell_what_happened_and_what_waits(store: Store, running: Served) -> None:
    submitted = await number(running, "taskcast_tasks_submitted_total")
    completed = await number(running, "taskcast_tasks_ended_total", status="completed")
    claims = await number(running, "taskcast_claims_total")
    await ended(store, "a", "b")
    await started(store)
    await submit(store)
    await submit(store, queue="agent:echo")
    assert await number(running, "taskcast_tasks_submitted_total") == submitted + 4
    assert await number(running, "taskcast_tasks_ended_total", status="completed") == completed + 1
    assert await number(running, "taskcast_claims_total") == claims + 2
    assert await number(running, "taskcast_queue_tasks", queue="default") == 1
    assert await number(running, "taskcast_queue_tasks", queue="agent:echo") == 1
    assert 0 < await number(running, "taskcast_queue_oldest_seconds", queue="default") < 60
    assert await number(running, "taskcast_leases") == 1
    assert await number(running, "taskcast_tasks") == 4
    assert await number(running, "taskcast_log_entries") == 9


async def test_a_task_is_counted_as_ended_once_and_again_when_it_ends_again(store: Store, running: Served) -> None:
    task = await ended(store)
    late = events.Restated(to="completed", internal_status="late")
    await store.append(ORG, task, late, operation="restated")
    assert await number(running, "taskcast_events_total", kind="restated") == 1
    assert await number(running, "taskcast_tasks_ended_total", status="completed") == 1
    assert await number(running, "taskcast_tasks_ended_total", status="failed") == 0
    await store.append(ORG, task, events.Continued(submission="again"))
    await store.append(ORG, task, events.Cancelled(), operation="cancelled")
    await store.delete(ORG, task)
    assert await number(running, "taskcast_tasks_submitted_total") == 2
    assert await number(running, "taskcast_tasks_ended_total", status="completed") == 1
    assert await number(running, "taskcast_tasks_ended_total", status="cancelled") == 1
    assert await number(running, "taskcast_events_total", kind="deleted") == 1


async def test_metrics_name_the_queues_that_were_used_last(store: Store, running: Served) -> None:
    for i in range(metrics.QUEUES_MAX + 1):
        await submit(store, queue=f"agent:{i}")
    text = (await running.client.get("/metrics")).text
    assert text.count("taskcast_queue_tasks{") == metrics.QUEUES_MAX
    assert 'queue="agent:0"' not in text
    assert f'queue="agent:{metrics.QUEUES_MAX}"' in text


async def test_metrics_answer_while_the_store_is_away(
    store: Store, running: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: Any) -> None:
        raise Unavailable("gone")

    monkeypatch.setattr(store.door, "read", gone)
    answer = await running.client.get("/metrics")
    assert answer.status_code == 200
    assert "taskcast_streams_open" in answer.text


async def test_requests_are_counted_by_route_not_by_path(store: Store, running: Served) -> None:
    labels = {"route": "/api/v1/tasks/{task_id}", "method": "GET", "status": "200"}
    before = await number(running, "taskcast_requests_total", **labels)
    for _ in range(3):
        await running.client.get(f"/api/v1/tasks/{await submit(store)}")
    assert await number(running, "taskcast_requests_total", **labels) == before + 3
    assert await number(running, "taskcast_request_seconds_count", route=labels["route"]) >= 3


async def test_the_page_is_served_when_there_is_one(running: Served) -> None:
    answer = await running.client.get("/")
    there = (Path(server.__file__).parent / "page.html").is_file()
    assert answer.status_code == (200 if there else 404)


# Chores


async def test_the_ticker_fires_deadlines_without_any_worker(store: Store, running: Served) -> None:
    task = await submit(store, deadline_seconds=0.2)

    async def timed_out() -> bool:
        body = (await running.client.get(f"/api/v1/tasks/{task}")).json()
        return bool(body["status"] == "TASK_STATUS_TIMEOUT")

    await wait_until(timed_out, "the deadline fires")


@pytest.mark.parametrize("error", [Unavailable("gone"), ZeroDivisionError()])
async def test_the_ticker_outlives_its_failures(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[int] = []

    async def fail() -> int:
        calls.append(1)
        raise error

    monkeypatch.setattr(server, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(store.queues, "tick", fail)
    ticking = asyncio.create_task(server.tick(store))
    await wait_until(lambda: len(calls) > 2, "it ticks again")
    ticking.cancel()


async def test_ended_tasks_are_forgotten_after_their_days(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FORGET_SECONDS", 0.1)
    task = await ended(store)
    async with served(store, settings, keep_days=1e-9) as running:

        async def gone() -> bool:
            return (await running.client.get(f"/api/v1/tasks/{task}")).status_code == 404

        await wait_until(gone, "the task is forgotten")


# Sockets


def test_a_port_in_use_is_one_clear_sentence(settings: Settings) -> None:
    with listen(settings.model_copy(update={"port": 0})) as first:
        port = first.getsockname()[1]
        with pytest.raises(Misconfigured, match=f"Port {port} of 127.0.0.1 is in use"):
            listen(settings.model_copy(update={"port": port}))


def test_an_address_that_is_not_ours_is_one_clear_sentence(settings: Settings) -> None:
    with pytest.raises(Misconfigured, match=r"192\.0\.2\.77, port 0, cannot be listened on"):
        listen(settings.model_copy(update={"host": "192.0.2.77", "port": 0}))
    with pytest.raises(Misconfigured, match=r"nowhere\.invalid is not an address"):
        listen(settings.model_copy(update={"host": "nowhere.invalid"}))


def test_two_processes_may_share_a_port(settings: Settings) -> None:
    with listen(settings.model_copy(update={"port": 0}), shared=True) as first:
        port = first.getsockname()[1]
        with listen(settings.model_copy(update={"port": port}), shared=True) as second:
            assert url_of(first) == url_of(second) == f"http://127.0.0.1:{port}"


def test_a_version_6_address_is_bracketed_in_the_url(settings: Settings) -> None:
    try:
        sock = listen(settings.model_copy(update={"host": "::1", "port": 0}))
    except Misconfigured:
        pytest.skip("no IPv6 here")
    with sock:
        assert url_of(sock) == f"http://[::1]:{sock.getsockname()[1]}"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
async def test_the_kernel_gives_up_on_a_peer_that_takes_nothing(running: Served) -> None:
    await running.client.get("/health")
    (connection,) = running.server.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == server.USER_TIMEOUT_MS


# Raw connections

HEAD = f"Host: localhost\r\nX-API-Key: {DEVELOPMENT_KEY}\r\nContent-Type: application/json\r\n"
SUBMISSION = b'{"query": "why?"}'
HANDSHAKE = "Connection: Upgrade\r\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n"


@contextlib.asynccontextmanager
async def raw(running: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """The next answer on the connection: its status, headers and JSON."""
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
    return int(status.split()[1]), headers, json.loads(body)


async def over(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the server closes."""
    rest = b""
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65536):
                rest += chunk
    return rest


H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("upgrade", [H2C, f"Upgrade: websocket\r\n{HANDSHAKE}"], ids=["h2c", "websocket"])
@pytest.mark.parametrize("pause", [False, True])
async def test_a_post_that_would_upgrade_is_served_as_it_is(running: Served, upgrade: str, pause: bool) -> None:
    head = f"POST /api/v1/tasks HTTP/1.1\r\n{HEAD}{upgrade}"
    sized = f"{head}Content-Length: {len(SUBMISSION)}\r\n\r\n".encode(), SUBMISSION
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), b"11\r\n" + SUBMISSION + b"\r\n0\r\n\r\n"
    async with raw(running) as (reader, writer):
        for first, second in (sized, chunked, sized):
            for part in (first[:50], first[50:], second) if pause else (first + second,):
                writer.write(part)
                for _ in range(10 * pause):
                    await asyncio.sleep(0)  # so that each part arrives alone
            status, _, body = await answer_of(reader)
            assert status == 200
            assert body["task_id"]
        writer.write(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{H2C}\r\n".encode() * 3)
        assert [(await answer_of(reader))[0] for _ in range(3)] == [200] * 3


async def test_a_handshake_that_cannot_be_read_is_answered(running: Served) -> None:
    for head in (
        f"GET /api/v1/stream/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n{HANDSHAKE}Content-Length: 5\r\n\r\nhello",
        f"GET /api/v1/stream/ws?a={'a' * 9000} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n{HANDSHAKE}\r\n",
    ):
        async with raw(running) as (reader, writer):
            writer.write(head.encode())
            status, _, body = await answer_of(reader)
            assert (status, body) == (400, {"error": "Invalid WebSocket handshake."})
            assert await over(reader) == b""


@pytest.mark.parametrize(
    "begun", ["NONSENSE\r\n\r\n", "CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET / HTTP/1.1\r\nx\r\n"]
)
async def test_what_is_no_http_is_told_so_in_json(running: Served, begun: str) -> None:
    async with raw(running) as (reader, writer):
        writer.write(begun.encode())
        status, headers, body = await answer_of(reader)
        assert (status, body) == (400, {"error": "Invalid HTTP request received."})
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert await over(reader) == b""


@pytest.mark.parametrize(
    "begun",
    [
        "",
        "\r\n",
        "GET /health HT",
        f"POST /api/v1/tasks HTTP/1.1\r\n{HEAD}Content-Length: 10\r\n\r\n{{",
        f"POST /api/v1/tasks HTTP/1.1\r\n{HEAD}{H2C}Content-Length: 10\r\n\r\n{{",
    ],
    ids=["nothing", "line break", "half a head", "half a body", "half a body after an upgrade"],
)
@pytest.mark.parametrize("served_before", [False, True])
async def test_a_request_that_does_not_come_is_not_awaited_for_ever(
    running: Served, monkeypatch: pytest.MonkeyPatch, begun: str, served_before: bool
) -> None:
    # Behind an answer the connection is idle until a byte comes, and idleness is another timer's.
    begun = begun or "\r\n" * served_before
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.2)
    async with raw(running) as (reader, writer):
        if served_before:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await answer_of(reader))[0] == 200
            (connection,) = running.server.server_state.connections
            assert connection._timer is None  # type: ignore[union-attr]
        writer.write(begun.encode())
        status, headers, body = await answer_of(reader)
        assert (status, body) == (408, {"error": "Request timeout"})
        assert headers["connection"] == "close"
        assert await over(reader) == b""
    await wait_until(lambda: not running.server.server_state.tasks, "nobody waits for the rest")


async def test_an_answer_faster_than_the_body_is_the_only_one(running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.3)
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
    async with raw(running) as (reader, writer):
        writer.write(head)
        assert (await answer_of(reader))[0] == 404
        assert await over(reader) == b""
    async with raw(running) as (reader, writer):
        writer.write(head)
        assert (await answer_of(reader))[0] == 404
        writer.write(b"hello")
        (connection,) = running.server.server_state.connections
        idle = cast("protocol.Http", connection)
        await wait_until(lambda: idle._timer is None, "the body has come")
        assert idle.timeout_keep_alive_task is not None
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await answer_of(reader))[0] == 200


async def test_a_stream_outlasts_the_time_for_requests(
    running: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.1)
    task, attempt = await started(store)
    async with raw(running) as (reader, writer), raw(running) as (silent, _):
        writer.write(f"GET /api/v1/tasks/{task}/stream HTTP/1.1\r\n{HEAD}\r\nGET /hea".encode())
        assert (await reader.readline()).endswith(b"200 OK\r\n")
        assert b" 408 " in await over(silent)  # so the time is over
        await attempt.complete()
        rest = await over(reader)
    assert b"connection: close" in rest  # what comes behind a stream is not answered
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_beyond_the_bound_a_connection_is_closed_at_once(
    running: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = await number(running, "taskcast_connections_refused_total")
    monkeypatch.setattr(protocol, "connections_max", lambda: 2)
    monkeypatch.setattr(protocol.Http, "_told_at", float("-inf"))
    with structlog.testing.capture_logs() as lines:
        async with raw(running) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await answer_of(reader))[0] == 200
            for _ in range(3):
                async with raw(running) as (late, _):
                    assert await over(late) == b""
    assert [line["event"] for line in lines].count("connection.refused") == 1
    assert await number(running, "taskcast_connections_refused_total") == refused + 3
    async with raw(running) as (reader, writer):
        await wait_until(lambda: len(running.server.server_state.connections) == 2, "there is room again")
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await answer_of(reader))[0] == 200


def test_a_tenth_of_the_files_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 4000))
    assert protocol.connections_max() == 900
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert protocol.connections_max() > 1_000_000


async def test_half_a_body_does_not_hold_the_drain(
    store: Store, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(store, settings, grace_seconds=30) as running, raw(running) as (reader, writer):
        writer.write(
            f"POST /api/v1/tasks HTTP/1.1\r\n{HEAD}Content-Length: 10\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"  # it is being served
        running.server.stop()
        await over(reader)
        await wait_until(lambda: not running.server.server_state.connections, "nothing is left")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("obedient", [True, False])
async def test_a_request_cut_off_by_the_end_of_the_drain_is_no_error(
    store: Store, settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, obedient: bool
) -> None:
    monkeypatch.setattr(server, "HANG_UP_SECONDS", 0.2)
    cut, let = asyncio.Event(), asyncio.Event()

    async def never(_: Request) -> Response:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cut.set()
            if obedient:
                raise
        await let.wait()
        return Response()

    async with asyncio.timeout(20):
        async with served(store, settings, grace_seconds=0.2) as running, raw(running) as (_, writer):
            running.server.config.app.router.routes.append(Route("/never", never))  # type: ignore[union-attr]
            writer.write(b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await wait_until(lambda: bool(running.server.server_state.tasks), "it is being served")
        assert cut.is_set()
        tasks = [*running.server.server_state.tasks]
        assert bool(tasks) is not obedient
        let.set()
        await asyncio.gather(*tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_what_any_client_can_cause_on_a_websocket_is_no_error(
    running: Served, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    task = await submit(store)
    head = f"HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n{HANDSHAKE}"
    for target, key in (("?workflow_id=none", True), (f"?workflow_id={task}", False), ("?workflow_id=", True)):
        async with raw(running) as (reader, writer):
            known = f"X-API-Key: {DEVELOPMENT_KEY}\r\n" if key else "X-API-Key: wrong\r\n"
            writer.write(f"GET /api/v1/stream/ws{target} {head}{known}\r\n".encode())
            assert (await answer_of(reader))[0] in {400, 401, 404}
            await over(reader)
    async with raw(running) as (reader, writer):
        writer.write(f"GET /api/v1/stream/ws?workflow_id={task} {head}X-API-Key: {DEVELOPMENT_KEY}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x81\x81\0\0\0\0\xff")  # a text that is no UTF-8
        assert b"\x88\x02\x03\xef" in await over(reader)  # closed with 1007
    await wait_until(lambda: not running.server.server_state.tasks, "all is said")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    logging.getLogger("uvicorn.error").error("anything else")
    assert "anything else" in caplog.text


# A whole process

PROCESS = """
import asyncio
import sys
from pathlib import Path
from starlette.routing import Route
from app import ops
from app.server import run
from app.settings import Settings

async def never(_):
    await asyncio.get_running_loop().create_future()

ops.routes.append(Route("/never", never))
settings = Settings(data=Path(sys.argv[1]), port=int(sys.argv[2]), grace_seconds=float(sys.argv[3]))
sys.exit(run(settings, ready=lambda url: print(url, flush=True)))
"""


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""

    async def code(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()

    async def errors(self) -> str:
        assert self.process.stderr
        return (await self.process.stderr.read()).decode()


@contextlib.asynccontextmanager
async def process(folder: Path, *, port: int = 0, grace: float = 5) -> AsyncIterator[Process]:
    made = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROCESS, str(folder), str(port), str(grace)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert made.stdout
    try:
        one = Process(made)
        one.url = (await made.stdout.readline()).decode().strip()
        yield one
    finally:
        if made.returncode is None:
            made.send_signal(signal.SIGTERM)
        await made.communicate()


async def test_a_process_serves_until_it_is_asked_to_stop_and_ends_well(tmp_path: Path) -> None:
    async with process(tmp_path / "data") as one, httpx.AsyncClient(base_url=one.url, headers=KEY) as client:
        assert (await client.post("/api/v1/tasks", json={"query": "q"})).status_code == 200
        one.process.send_signal(signal.SIGTERM)
        assert await one.code() == 0
        told = [json.loads(line) for line in (await one.errors()).splitlines()]
    events = [line["event"] for line in told]
    assert "server.ready" in events
    assert events.index("server.development_key") > events.index("server.ready")
    assert next(line["url"] for line in told if line["event"] == "server.ready") == one.url


async def test_sigint_is_a_good_end_too_and_open_streams_are_aborted(tmp_path: Path) -> None:
    async with process(tmp_path / "data") as one, httpx.AsyncClient(base_url=one.url, headers=KEY) as client:
        task = (await client.post("/api/v1/tasks", json={"query": "q"})).json()["task_id"]
        async with client.stream("GET", f"/api/v1/tasks/{task}/stream") as stream:
            body = stream.aiter_raw()
            await anext(body)
            one.process.send_signal(signal.SIGINT)
            rest = b""
            with pytest.raises(httpx.RemoteProtocolError):
                async for chunk in body:
                    rest += chunk
        assert b"\nretry: " in b"\n" + rest
        assert b"[DONE]" not in rest
        assert await one.code() == 0


async def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with process(tmp_path / "data", grace=600) as one, httpx.AsyncClient(base_url=one.url) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", int(one.url.rpartition(":")[2]))
        writer.write(b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.get("/health")  # by now it is being served
        one.process.send_signal(signal.SIGTERM)

        async def listens() -> bool:
            try:
                await client.get("/health", headers={"Connection": "close"})
            except httpx.TransportError:
                return False
            return True

        async def deaf() -> bool:
            return not await listens()

        await wait_until(deaf, "it listens no more")
        assert one.process.returncode is None
        one.process.send_signal(signal.SIGTERM)
        assert await one.code() == 1
        writer.close()


async def test_a_process_whose_port_is_taken_says_so_and_another_start_cannot_help(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with process(tmp_path / "data", port=port) as one:
            assert await one.code() == 2
            assert await one.errors() == f"Port {port} of 127.0.0.1 is in use; choose another one with --port.\n"
    assert not (tmp_path / "data").exists()


async def test_a_store_that_is_away_is_worth_another_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCAST_REDIS_URL", f"unix://{tmp_path}/nothing.sock")
    async with process(tmp_path / "data") as one:
        assert await one.code() == 1
        assert "cannot be reached" in await one.errors()


def test_a_process_stopped_while_it_starts_ends_well(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.asynccontextmanager
    async def slow(_: Settings) -> AsyncIterator[Store]:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.get_running_loop().create_future()
        yield  # type: ignore[misc]

    monkeypatch.setattr(server, "open_store", slow)
    monkeypatch.setattr(server, "configure_logs", lambda _: None)
    assert threading.current_thread() is threading.main_thread()
    assert server.run(settings.model_copy(update={"port": 0})) == 0


async def test_shannons_errors_are_the_edges_errors() -> None:
    assert respond(errors.NotFound("Task not found")).status_code == shannon.error_body(errors.NotFound("x"))[0]


def test_the_process_runs_on_uvloop(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*_: Any, **__: Any) -> int:
        return 0 if isinstance(asyncio.get_running_loop(), uvloop.Loop) else 3

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(server, "configure_logs", lambda _: None)
    assert server.run(settings) == 0
