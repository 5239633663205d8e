"""The model worker against a real HTTP server that speaks the OpenAI protocol, well and badly."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from typing import Any, cast

import msgspec
import pytest
from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails

from app.task import Status, Task
from tests.waiting import wait_until
from workers import Context, Failed
from workers.llm import (
    RETRIES_MAX,
    Answer,
    BrokenOffError,
    Endpoint,
    llm,
)

KEY = "sk-secret-1234567890"
SOON = {"retry-after-ms": "1"}
"""What the client waits instead of its own half a second."""
MODEL = "test-model"


def chunk(text: str | None = None, *, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]} | more


def usage(read: int, written: int, **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return chunk(choices=[], usage=counts | more)


WHOLE = (chunk("Hel"), chunk("lo."), chunk(finish="stop"), usage(11, 2))


class Exchange:
    """One request, and the means to answer it piece by piece."""

    def __init__(self, head: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = head.split("\r\n")
        self.path = lines[0].split(" ")[1]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        self.body: dict[str, Any] = json.loads(body)
        self._reader, self._writer = reader, writer

    async def refuse(self, status: int, body: object, headers: Mapping[str, str] = SOON) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self._send(self._head(status, {"content-length": str(len(raw)), **headers}) + raw)

    async def begin(self, headers: Mapping[str, str] | None = None) -> None:
        named = {"content-type": "text/event-stream", "transfer-encoding": "chunked", **(headers or {})}
        await self._send(self._head(200, named))

    async def say(self, *chunks: object) -> None:
        for one in chunks:
            line = one if isinstance(one, bytes) else b"data: " + json.dumps(one).encode() + b"\n\n"
            await self._send(b"%x\r\n%s\r\n" % (len(line), line))

    async def end(self) -> None:
        await self._send(b"0\r\n\r\n")

    async def tell(self, *chunks: object, headers: Mapping[str, str] | None = None) -> None:
        """A whole stream in good order."""
        await self.begin(headers)
        await self.say(*chunks, b"data: [DONE]\n\n")
        await self.end()

    async def hang_up(self) -> None:
        self._writer.transport.abort()

    async def client_is_gone(self) -> None:
        with suppress(ConnectionError):
            while await self._reader.read(4096):
                pass

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items()), "connection: close"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def _send(self, raw: bytes) -> None:
        self._writer.write(raw)
        await self._writer.drain()


Reply = Callable[[Exchange], Awaitable[None]]


class Server:
    """Answers request number n with reply number n, and each further one with the last reply."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.seen: list[Exchange] = []
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().strip()
            length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
            exchange = Exchange(head, await reader.readexactly(length), reader, writer)
            self.seen.append(exchange)
            await self.replies[min(len(self.seen), len(self.replies)) - 1](exchange)
        except ConnectionError:
            pass  # the client is gone: the test looks at it from the other side
        finally:
            writer.close()


@asynccontextmanager
async def serving(*replies: Reply) -> AsyncIterator[Server]:
    server = Server(*replies)
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    async with listener:
        yield server


def refusing(status: int, body: object, headers: Mapping[str, str] = SOON) -> Reply:
    return lambda exchange: exchange.refuse(status, body, headers)


def telling(*chunks: object, headers: Mapping[str, str] | None = None) -> Reply:
    return lambda exchange: exchange.tell(*chunks, headers=headers)


class Recorder:
    """Stands for a Context, and remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.at: list[tuple[float, float]] = []
        self.usage: list[dict[str, Any]] = []
        self.notes: list[tuple[str, str]] = []
        self.checkpoints = 0
        self.task = asking()

    async def delta(self, delta: str) -> None:
        began = time.monotonic()
        await asyncio.sleep(0)
        self.texts.append(delta)
        self.at.append((began, time.monotonic()))

    def used(self, **consumed: Any) -> None:
        self.usage.append(consumed)

    async def emit(self, name: str, message: str, _payload: Mapping[str, Any] | None = None) -> None:
        self.notes.append((name, message))

    async def checkpoint(self, _: str) -> None:
        self.checkpoints += 1


def asking(query: str = "What is the capital of France?") -> Task:
    return Task(
        id="t1",
        org="o",
        status=Status.RUNNING,
        queue="agent:llm",
        submission="s",
        last_seq=2,
        last_event_id="1-0",
        created_at=1,
        updated_at=1,
        query=query,
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[str]]:
    """Runs the handler with the server in its environment, and the arguments that the runtime would give it."""

    async def run(ctx: Recorder, server: Server, *, key: str = KEY, **named: Any) -> str:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        context = {"model": MODEL} | named
        ctx.task = msgspec.structs.replace(ctx.task, context=context)
        answer = await llm(cast("Context", ctx))
        assert isinstance(answer, str)
        return answer

    return run


Ask = Callable[..., Awaitable[str]]


# The answer


async def test_an_answer_streams_and_says_model_provider_and_tokens(ask: Ask) -> None:
    ctx = Recorder()
    async with serving(telling(*WHOLE)) as server:
        assert await ask(ctx, server) == "Hello."
        assert "".join(ctx.texts) == "Hello."
        host = server.url.removeprefix("http://").removesuffix("/v1")
    assert ctx.usage == [{"model": MODEL, "provider": host, "input_tokens": 11, "output_tokens": 2, "cost_usd": 0.0}]
    assert ctx.notes == []
    assert ctx.checkpoints == 1
    sent = server.seen[0]
    assert sent.path == "/v1/chat/completions"
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert sent.body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_task_may_choose_model_system_prompt_temperature_and_length(ask: Ask) -> None:
    chosen = {"system_prompt": "Be brief.", "temperature": 0, "max_tokens": 7, "model_override": "other"}
    async with serving(telling(*WHOLE)) as server:
        await ask(Recorder(), server, **chosen)
    body = server.seen[0].body
    assert body["model"] == "other"
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0
    assert body["max_tokens"] == 7


async def test_the_agents_model_and_effort_hold_unless_the_task_says_more(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_MODEL", "from-the-environment")
    ctx = Recorder()
    ctx.task = msgspec.structs.replace(ctx.task, llm_model="agents", llm_provider="openai", llm_effort="xhigh")
    priced = [{**one, "model": "gpt-4o-mini"} for one in WHOLE]
    async with serving(telling(*priced)) as server:
        await ask(ctx, server, model="")
        await ask(ctx, server, model="own")
        await ask(ctx, server, model="own", model_override="override", provider="anthropic")
    assert [one.body["model"] for one in server.seen] == ["agents", "own", "override"]
    assert {one.body["reasoning_effort"] for one in server.seen} == {"xhigh"}
    assert [used["provider"] for used in ctx.usage] == ["openai", "openai", "anthropic"]


async def test_the_environment_names_the_model_when_the_task_does_not(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_MODEL", "from-the-environment")
    async with serving(telling(*WHOLE)) as server:
        await ask(Recorder(), server, model="")
    assert server.seen[0].body["model"] == "from-the-environment"


async def test_without_any_model_the_task_fails_and_says_what_to_do(ask: Ask) -> None:
    async with serving(telling(*WHOLE)) as server:
        with pytest.raises(Failed, match="set OPENAI_MODEL"):
            await ask(Recorder(), server, model="")
    assert server.seen == []


@pytest.mark.parametrize("named", [{"temperature": 3}, {"max_tokens": 0}, {"model": 5}])
def test_what_a_task_asks_for_is_checked(named: dict[str, object]) -> None:
    with pytest.raises(Failed, match=f"context.{next(iter(named))}: "):
        llm.arguments(named)


async def test_llama_cpp_says_its_own_name_and_costs_nothing(ask: Ask) -> None:
    ctx = Recorder()
    async with serving(telling(*WHOLE, headers={"server": "llama.cpp"})) as server:
        await ask(ctx, server, provider_override="openai")
    assert ctx.usage[0]["provider"] == "llama.cpp"
    assert ctx.usage[0]["cost_usd"] == 0


async def test_a_gateway_answers_for_the_provider_that_the_task_names(ask: Ask) -> None:
    ctx = Recorder()
    priced = [{**one, "model": "gpt-4o-mini"} for one in WHOLE]
    async with serving(telling(*priced)) as server:
        await ask(ctx, server, provider_override="openai")
    assert (ctx.usage[0]["provider"], ctx.usage[0]["model"]) == ("openai", "gpt-4o-mini")
    assert ctx.usage[0]["cost_usd"] > 0


async def test_unreported_usage_is_said_and_not_invented(ask: Ask) -> None:
    ctx = Recorder()
    async with serving(telling(*WHOLE[:3])) as server:
        assert await ask(ctx, server) == "Hello."
    assert (ctx.usage[0]["input_tokens"], ctx.usage[0]["output_tokens"], ctx.usage[0]["cost_usd"]) == (0, 0, 0)
    assert [name for name, _ in ctx.notes] == ["WARNING"]
    assert "did not report how many tokens" in ctx.notes[0][1]


async def test_usage_repeated_in_every_chunk_counts_once(ask: Ask) -> None:
    ctx = Recorder()
    running = [one | {"usage": usage(11, n)["usage"]} for n, one in enumerate(WHOLE[:3], 1)]
    async with serving(telling(*running)) as server:
        await ask(ctx, server)
    assert (ctx.usage[0]["input_tokens"], ctx.usage[0]["output_tokens"]) == (11, 3)


async def test_chunks_without_choices_or_delta_are_passed_over(ask: Ask) -> None:
    empty = [chunk(choices=None), chunk(choices=[{"index": 0, "delta": None, "finish_reason": None}])]
    async with serving(telling(*empty, *WHOLE)) as server:
        assert await ask(Recorder(), server) == "Hello."


async def test_an_answer_cut_at_its_length_is_kept_and_says_so(ask: Ask) -> None:
    ctx = Recorder()
    async with serving(telling(chunk("Hel"), chunk(finish="length"), usage(1, 1))) as server:
        assert await ask(ctx, server) == "Hel"
    assert "stops early" in ctx.notes[0][1]


# Retries


async def test_too_many_requests_are_tried_again(ask: Ask) -> None:
    ctx = Recorder()
    async with serving(refusing(429, {"error": {"message": "slow down"}}), telling(*WHOLE)) as server:
        assert await ask(ctx, server) == "Hello."
    assert len(server.seen) == 2
    assert "".join(ctx.texts) == "Hello."


async def test_a_failing_server_is_given_up_after_its_tries(ask: Ask) -> None:
    async with serving(refusing(500, {"error": {"message": "on fire"}})) as server:
        with pytest.raises(Failed, match=rf"fails \(500\) after {RETRIES_MAX + 1} tries: on fire"):
            await ask(Recorder(), server)
    assert len(server.seen) == RETRIES_MAX + 1


async def test_without_retry_after_the_client_backs_off(ask: Ask) -> None:
    began = time.monotonic()
    async with serving(refusing(503, b"<html>", headers={}), telling(*WHOLE)) as server:
        assert await ask(Recorder(), server) == "Hello."
    assert time.monotonic() - began > 0.3  # half a second less a quarter


async def test_a_long_retry_after_is_not_waited_for(ask: Ask) -> None:
    async with serving(refusing(429, {"error": {"message": "come back tomorrow"}}, {"retry-after": "86400"})) as server:
        with pytest.raises(Failed, match=r"too many requests \(429\): come back tomorrow"):
            await ask(Recorder(), server)
    assert len(server.seen) == 1


# Failures


def error(code: str | None, message: str = "words", kind: str = "x") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            401,
            error("invalid_api_key", f"Incorrect API key provided: {KEY}"),
            "refused the key in OPENAI_API_KEY (401).",
        ),
        (403, error(None, f"no {KEY}"), "refused the key in OPENAI_API_KEY (403)."),
        (404, error("model_not_found", "no such model"), f"knows no model {MODEL}, or"),
        (404, b"<html>nothing here</html>", "OPENAI_BASE_URL is not its address (404)."),
        (
            400,
            error("context_length_exceeded", "at most 8 tokens."),
            f"too long for the model {MODEL}: at most 8 tokens.",
        ),
        (400, error("400", "too big", "exceed_context_size_error"), f"too long for the model {MODEL}: too big."),
        (400, error("content_filter"), "content filter of the model endpoint"),
        (400, error(None, "temperature is odd"), "refused the request (400): temperature is odd."),
        (422, {"detail": [{"msg": "no"}]}, "refused the request (422)."),
        (429, error("insufficient_quota"), "has no credit left."),
        (502, b"<html>bad gateway</html>", f"fails (502) after {RETRIES_MAX + 1} tries."),
        (400, error(None, f"you sent {KEY}\nand " + "x" * 1000), "you sent … and xxx"),
    ],
)
async def test_a_refusal_becomes_one_clear_sentence(ask: Ask, status: int, body: object, sentence: str) -> None:
    async with serving(refusing(status, body)) as server:
        with pytest.raises(Failed) as failed:
            await ask(Recorder(), server)
    said = str(failed.value)
    assert sentence in said
    assert KEY not in said
    assert len(said) < 500
    assert failed.value.__suppress_context__, "the client's own error, which quotes the endpoint, is not logged with it"


async def test_an_endpoint_that_wants_a_key_says_which_variable_to_set(ask: Ask) -> None:
    async with serving(refusing(401, error(None))) as server:
        with pytest.raises(Failed, match=r"wants a key \(401\): set OPENAI_API_KEY"):
            await ask(Recorder(), server, key="")
    assert KEY not in server.seen[0].headers["authorization"]


async def test_a_key_that_is_only_a_word_leaves_sentences_alone(ask: Ask) -> None:
    async with serving(refusing(400, error(None, "not a local matter"))) as server:
        with pytest.raises(Failed, match="not a local matter"):
            await ask(Recorder(), server, key="local")


async def test_an_endpoint_that_is_not_there_is_named(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.llm.RETRIES_MAX", 1)
    async with serving() as server:
        pass
    with pytest.raises(Failed, match=r"127\.0\.0\.1:\d+ cannot be reached after 2 tries: \w"):
        await ask(Recorder(), server)


async def test_an_endpoint_that_never_answers_is_named(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Endpoint.client

    def impatient(self: Endpoint) -> Any:
        return patient(self).with_options(timeout=0.05, max_retries=0)

    monkeypatch.setattr(Endpoint, "client", impatient)
    async with serving(Exchange.client_is_gone) as server:
        with pytest.raises(Failed, match="did not answer in time"):
            await ask(Recorder(), server)


@pytest.mark.parametrize(
    ("chunks", "sentence"),
    [
        ([chunk(finish="stop")], "gave an empty answer"),
        ([chunk(" \n"), chunk(finish="stop")], "gave an empty answer"),
        ([chunk(finish="length")], "used up its tokens before its answer began"),
        ([chunk(finish="tool_calls")], "asked for a tool"),
        ([chunk("So you"), chunk(finish="content_filter")], "content filter"),
        (
            [chunk(choices=[{"index": 0, "delta": {"refusal": "I will not."}, "finish_reason": "stop"}])],
            "refused: I will",
        ),
        ([chunk("a"), error("content_filter")], "content filter"),
        ([b"data: {broken\n\n"], "not the OpenAI protocol"),
        ([7], "not the OpenAI protocol"),
        ([chunk(choices=["odd"])], "not the OpenAI protocol"),
        ([b"<html>\n\n"], "streamed no answer"),
    ],
)
async def test_an_answer_that_is_none_fails_the_task(ask: Ask, chunks: list[object], sentence: str) -> None:
    async with serving(telling(*chunks)) as server:
        with pytest.raises(Failed, match=sentence):
            await ask(Recorder(), server)
    assert len(server.seen) == 1


async def break_off(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.say(chunk("Hel"), chunk("lo "))
    await exchange.hang_up()


async def end_early(exchange: Exchange) -> None:
    await exchange.tell(chunk("Hel"), chunk("lo "))


async def report_an_error(exchange: Exchange) -> None:
    await exchange.tell(chunk("Hel"), chunk("lo "), error("server_error", "the GPU is gone"))


@pytest.mark.parametrize("reply", [break_off, end_early, report_an_error])
async def test_a_stream_that_breaks_is_not_begun_again_in_this_attempt(ask: Ask, reply: Reply) -> None:
    ctx = Recorder()
    async with serving(reply, telling(*WHOLE)) as server:
        with pytest.raises(BrokenOffError, match="The model endpoint"):
            await ask(ctx, server)
    assert len(server.seen) == 1
    assert "".join(ctx.texts) == "Hello "  # all that came, once
    assert llm.retry == (BrokenOffError,)


async def test_a_break_after_the_answers_end_costs_only_the_usage(ask: Ask) -> None:
    async def reply(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say(*WHOLE[:3])
        await exchange.hang_up()

    ctx = Recorder()
    async with serving(reply) as server:
        assert await ask(ctx, server) == "Hello."
    assert "did not report" in ctx.notes[0][1]


# Cancellation


async def test_a_cancel_closes_the_stream_to_the_model(ask: Ask) -> None:
    gone = asyncio.Event()

    async def reply(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say(chunk("Hel"))
        await exchange.client_is_gone()
        gone.set()

    ctx = Recorder()
    async with serving(reply) as server:
        running = asyncio.ensure_future(ask(ctx, server))
        await wait_until(lambda: ctx.texts == ["Hel"], "the first text arrives")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await wait_until(gone.is_set, "the server sees the connection close")
    assert ctx.usage == []


async def test_a_cancel_before_the_first_text_closes_the_connection(ask: Ask) -> None:
    gone = asyncio.Event()

    async def reply(exchange: Exchange) -> None:
        await exchange.client_is_gone()
        gone.set()

    async with serving(reply) as server:
        running = asyncio.ensure_future(ask(Recorder(), server))
        await wait_until(lambda: len(server.seen) == 1, "the request arrives")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await wait_until(gone.is_set, "the server sees the connection close")


async def test_a_store_that_refuses_text_ends_the_stream_with_its_own_error(ask: Ask) -> None:
    gone = asyncio.Event()

    async def reply(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.say(chunk("Hel"))
        await exchange.client_is_gone()
        gone.set()

    class Full(Recorder):
        async def delta(self, delta: str) -> None:
            raise LookupError(f"no room for {delta}")

    async with serving(reply) as server:
        with pytest.raises(LookupError, match="no room for Hel"):
            await ask(Full(), server)
        await wait_until(gone.is_set, "the server sees the connection close")


# The endpoint and its prices


@pytest.mark.parametrize(
    ("url", "name", "provider", "loopback"),
    [
        ("", "api.openai.com", "openai", False),
        ("https://api.groq.com/openai/v1", "api.groq.com", "groq", False),
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", "", True),
        ("http://localhost:11434/v1", "localhost:11434", "", True),
        ("http://[::1]:8000/v1", "[::1]:8000", "", True),
        ("https://me:password@llm.example/v1", "llm.example", "", False),
    ],
)
def test_an_address_tells_who_answers(url: str, name: str, provider: str, *, loopback: bool) -> None:
    endpoint = Endpoint.from_env({"OPENAI_BASE_URL": url, "OPENAI_API_KEY": f" {KEY}\n"})
    assert (endpoint.name, endpoint.provider, endpoint.loopback) == (name, provider, loopback)
    assert endpoint.key == KEY
    assert KEY not in repr(endpoint)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_BASE_URL": "localhost:8000/v1"}, "OPENAI_BASE_URL is no address"),
        ({"OPENAI_BASE_URL": "http://"}, "OPENAI_BASE_URL is no address"),
        ({"OPENAI_BASE_URL": "http://h:99999/v1"}, "OPENAI_BASE_URL is no address"),
        ({"OPENAI_BASE_URL": "http://[::1/v1"}, "OPENAI_BASE_URL is no address"),
        ({"OPENAI_API_KEY": "sk-“quoted”"}, "characters that no key has"),
    ],
)
def test_a_wrong_environment_is_explained(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(Failed, match=sentence):
        Endpoint.from_env(env)


async def test_openai_itself_gets_the_new_name_of_the_length(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "provider", "openai")
    async with serving(telling(*WHOLE)) as server:
        await ask(Recorder(), server, max_tokens=7)
    assert server.seen[0].body["max_completion_tokens"] == 7
    assert "max_tokens" not in server.seen[0].body


def consumed(read: int, written: int, cached: int = 0) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=read,
        completion_tokens=written,
        total_tokens=read + written,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def test_a_known_model_has_its_price_and_cached_tokens_cost_less() -> None:
    plain = Answer(usage=consumed(1_000_000, 1_000_000)).cost(provider="openai", model="gpt-4o-mini")
    cached = Answer(usage=consumed(1_000_000, 1_000_000, cached=900_000)).cost(provider="openai", model="gpt-4o-mini")
    assert plain
    assert cached
    assert Decimal(0) < cached < plain


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "no-such-model"), ("llm.example", "gpt-4o-mini"), ("llama.cpp", "gpt-4o-mini")]
)
def test_an_unknown_model_or_seller_has_no_price(provider: str, model: str) -> None:
    assert Answer(usage=consumed(1, 1)).cost(provider=provider, model=model) is None


def test_counts_that_are_none_count_nothing() -> None:
    odd = CompletionUsage.model_construct(prompt_tokens=-3, completion_tokens="many", prompt_tokens_details=None)
    assert Answer(usage=odd).tokens() == (0, 0, 0)
    assert Answer(usage=consumed(5, 1, cached=9)).tokens() == (5, 5, 1)
