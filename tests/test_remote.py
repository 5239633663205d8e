"""The verbs over HTTP, against a server that answers whatever the test wants: foreign, ill, silent, gone."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from httpx_sse import ServerSentEvent

from app import remote
from app.remote import Api, Problem

Answer = Callable[[BaseHTTPRequestHandler], None]


class Canned(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Canned.Handler)
        self.answers: list[Answer] = []
        self.cursors: list[str | None] = []
        """The `Last-Event-ID` of each request."""
        self.posted: list[tuple[str, str | None, dict[str, object]]] = []
        """Path, `If-Match` and body of each POST."""

    class Handler(BaseHTTPRequestHandler):
        server: "Canned"

        def do_GET(self) -> None:
            self.server.cursors.append(self.headers["Last-Event-ID"])
            self.server.answers.pop(0)(self)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.posted.append((self.path, self.headers["If-Match"], json.loads(body)))
            self.server.answers.pop(0)(self)

        def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Canned]:
    with Canned() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def api(server: Canned, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with Api(f"http://127.0.0.1:{server.server_port}/", "") as made:
        yield made


def says(status: int, body: object, kind: str = "application/json") -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    return answer


def streams(text: str, *, breaks: bool = True) -> Answer:
    """A stream that promises more than it says, unless it does not break."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Length", str(len(text) + breaks))
        handler.end_headers()
        handler.wfile.write(text.encode())

    return answer


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


ONE = "id: 1-0\nevent: PROGRESS\ndata: {}\n\n"
DONE = "id: 1-0.end\nevent: done\ndata: [DONE]\n\n"


@pytest.mark.parametrize(
    ("answer", "sentence", "code"),
    [
        (says(404, "<html>", "text/html"), r"What answers at .* is no Taskcast \(HTTP 404\)\.", 2),
        (says(500, ["error"]), "is no Taskcast", 2),
        (says(404, {"error": "Task not found"}), r"^Task not found\.$", 5),
        (says(409, {"error": "task is not paused"}), r"^Refused: task is not paused\.$", 1),
        (says(400, {"error": "Query is required"}), r"^Refused: Query is required\.$", 2),
        (says(503, {"error": "The store is full."}), r"answered: The store is full \(HTTP 503\)\.$", 2),
        (says(401, {"error": "Unauthorized"}), "does not know this key", 2),
        (hangs_up, "The connection to .* broke", 2),
    ],
)
def test_every_refusal_is_a_sentence_and_a_code(
    answer: Answer, sentence: str, code: int, api: Api, server: Canned
) -> None:
    server.answers = [answer]
    with pytest.raises(Problem, match=sentence) as problem:
        api.ask("GET", "/api/v1/tasks/x")
    assert problem.value.code == code


def test_a_silent_server_is_not_waited_for_without_end(server: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_SECONDS_MAX", 0.05)
    released = threading.Event()

    def waits(_: BaseHTTPRequestHandler) -> None:
        released.wait(5)

    server.answers = [waits]
    with Api(f"http://127.0.0.1:{server.server_port}", "") as api, pytest.raises(Problem, match="does not answer"):
        api.ask("GET", "/api/v1/tasks/x")
    released.set()


@pytest.mark.parametrize("url", ["http://a:b", "http://", "localhost:8080", "file:///tmp/x"])
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    with pytest.raises(Problem, match="is not a URL"):
        Api(url, "key")


def test_a_server_elsewhere_needs_a_key_of_its_own() -> None:
    with pytest.raises(Problem, match="needs a key"):
        Api("https://taskcast.example", "")
    for url in ("http://localhost:1", "http://127.1.2.3:1", "http://[::1]:1"):
        with Api(url, "") as api:
            assert api.http.headers["X-API-Key"] == remote.DEVELOPMENT_KEY


# Times


def test_times_are_told_in_units() -> None:
    told = {"90": 90, "90s": 90, "1.5m": 90, "2 h": 7200, "1d": 86_400, "0": 0}
    assert {text: remote._seconds("--in", text) for text in told} == told
    for text in ("soon", "-1", "1w", "1e9", "", "1h30m", "9" * 20):
        with pytest.raises(Problem, match=r"^--in must be a time, such as 90, 90s, 5m, 2h or 1d\.$"):
            remote._seconds("--in", text)


def test_a_moment_without_an_offset_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    nine = datetime(2030, 1, 31, 9, tzinfo=UTC)
    for text in ("2030-01-31T09:00:00Z", "2030-01-31T10:00+01:00"):
        assert remote._moment(text) == nine
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    time.tzset()
    try:
        assert remote._moment("2030-01-31T11:00") == nine
    finally:
        monkeypatch.undo()
        time.tzset()
    for text in ("tomorrow", "2030-02-30", "0001-01-01T00:00:00+14:00"):
        with pytest.raises(Problem, match="--at must be a moment"):
            remote._moment(text)


def test_a_submission_has_only_the_options_that_were_given(server: Canned) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    server.answers = [says(200, {"task_id": "x"})] * 3
    remote.submit("q", url=url)
    remote.submit("q", at="2030-01-31T09:00:00Z", ttl="1h", timeout="5m", priority=2, max_attempts=7, url=url)
    before = datetime.now(UTC)
    remote.submit("q", in_="90", url=url)
    bare, full, delayed = [body for _, _, body in server.posted]
    assert bare == {"query": "q"}
    assert full == {
        "query": "q",
        "run_at": "2030-01-31T09:00:00+00:00",
        "priority": 2,
        "max_attempts": 7,
        "ttl_seconds": 3600,
        "timeout_seconds": 300,
    }
    assert 89 <= (datetime.fromisoformat(str(delayed["run_at"])) - before).total_seconds() <= 100
    with pytest.raises(Problem, match="contradict"):
        remote.submit("q", at="2030-01-31T09:00:00Z", in_="90", url=url)


# Decisions


def test_a_plan_is_approved_or_changed_as_it_was_read(server: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    task = says(200, {"review": {"pending": True, "version": 3}})
    server.answers = [task, says(200, {"status": "approved"})]
    remote.approve("x", url=url)
    server.answers = [task, says(200, {"version": 4, "current_plan": "1.\x1b Ask."})]
    remote.deny("x", feedback="Shorter.", url=url)
    server.answers = [task, says(200, {"version": 3, "current_plan": "1. Ask."})]
    remote.deny("x", feedback="Shorter.", url=url)
    server.answers = [task, says(200, {"version": 4})]
    remote.deny("x", feedback="Shorter.", as_json=True, url=url)
    server.answers = [task]
    with pytest.raises(Problem, match="say with --feedback what should be different"):
        remote.deny("x", url=url)
    feedback = ("/api/v1/tasks/x/review", "3", {"action": "feedback", "message": "Shorter."})
    assert server.posted == [("/api/v1/tasks/x/review", "3", {"action": "approve"}), *[feedback] * 3]
    assert capsys.readouterr().out.splitlines() == [
        "The plan of task x is approved.",
        "The next plan of task x:",
        "",
        "1. Ask.",
        "The worker of task x makes another plan; `taskcast approvals` shows when it is there.",
        '{"version":4}',
    ]


def test_a_task_that_waits_for_nothing_cannot_be_decided_about(server: Canned) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    for body in ({}, {"review": {"pending": False, "version": 1}}):
        server.answers = [says(200, body)]
        with pytest.raises(Problem, match=r"^Task x waits for no decision\.$") as problem:
            remote.approve("x", url=url)
        assert problem.value.code == remote.FAILED


def test_a_named_approval_is_not_looked_up(server: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    server.answers = [says(200, {"success": True})]
    remote.deny("x", approval="a", feedback="No.", url=url)
    body = {"workflow_id": "x", "approval_id": "a", "approved": False, "feedback": "No."}
    assert server.posted == [("/api/v1/approvals/decision", None, body)]
    assert capsys.readouterr().out == "Approval a of task x is denied.\n"


def followed(api: Api) -> list[str]:
    told = api.follow("x")
    return [item.event if isinstance(item, ServerSentEvent) else "lost" if item else "found" for item in told]


def test_a_broken_stream_is_opened_again_behind_its_last_event(api: Api, server: Canned) -> None:
    server.answers = [
        streams(ONE),
        hangs_up,
        says(503, {"error": "draining"}),
        streams("", breaks=False),
        streams(DONE),
    ]
    assert followed(api) == ["PROGRESS", "lost", "lost", "lost", "found", "lost", "found", "done"]
    assert server.cursors == [None, "1-0", "1-0", "1-0", "1-0"]


def test_a_stream_whose_end_was_read_before_is_over(api: Api, server: Canned) -> None:
    server.answers = [streams(ONE), says(204, "")]
    assert followed(api) == ["PROGRESS", "lost"]


def test_a_task_that_is_deleted_meanwhile_ends_the_watch(api: Api, server: Canned) -> None:
    server.answers = [streams(ONE), says(404, {"error": "Task not found"})]
    with pytest.raises(Problem, match="Task not found") as problem:
        followed(api)
    assert problem.value.code == remote.MISSING


def test_a_server_that_stays_away_is_given_up(api: Api, server: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOST_SECONDS_MAX", 0.0)
    server.answers = [streams(ONE), hangs_up]
    with pytest.raises(Problem, match=r"has not answered for 0\.0 s; the task may go on\."):
        followed(api)


def test_a_stream_that_cannot_begin_is_no_server(api: Api, server: Canned) -> None:
    server.answers = [hangs_up]
    with pytest.raises(Problem, match="broke"):
        followed(api)
