"""The verbs over HTTP, against a server that answers whatever the test wants: foreign, ill, silent, gone."""

import json
import threading
from collections.abc import Callable, Iterator
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

    class Handler(BaseHTTPRequestHandler):
        server: "Canned"

        def do_GET(self) -> None:
            self.server.cursors.append(self.headers["Last-Event-ID"])
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
