"""A task answered by a language model, over any OpenAI-compatible endpoint.

The endpoint is the environment's: OPENAI_BASE_URL, OPENAI_API_KEY and, unless the task or its agent names a model,
OPENAI_MODEL; all are read when a task begins. The text streams as it comes. What the endpoint does not report (tokens, a price) is
not made up.

429, 5xx and refused connections are tried again, with backoff, before the first byte of an answer. A stream that
breaks later ends the attempt, and the task is queued for another: no attempt says its text twice. Sessions are not
memory: the model sees this task's question and nothing else.

This file must never let the key into an event, an error or a log.
"""

import functools
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from http import HTTPStatus
from ipaddress import ip_address
from typing import Annotated, cast
from urllib.parse import urlsplit

import httpx
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AsyncStream,
    DefaultAsyncHttpxClient,
    omit,
)
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from openai.types.shared import ReasoningEffort
from pydantic import Field

from app.task import Task
from workers import Context, Failed, task

OPENAI_URL = "https://api.openai.com/v1"
LLAMA_CPP = "llama.cpp"
RETRIES_MAX = 5
"""After 0.5, 1, 2, 4 and 8 s, less up to a quarter, or when Retry-After says: the client's own loop."""
QUOTE_CHARS_MAX = 300
"""Of an endpoint's own words in an error."""
SECRET_CHARS_MIN = 8
"""A shorter key is no secret but a word, such as `local`, and may stand in a sentence."""

TOO_LONG = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
FILTERED = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached"}
"""Codes of OpenAI, Azure and llama.cpp."""
FINAL = TOO_LONG | FILTERED | NO_CREDIT

Say = Callable[[str], Awaitable[None]]


class BrokenOffError(Exception):
    """The stream ended before the answer did. Another attempt may succeed."""


@task("default", "agent:llm", retry=(BrokenOffError,))
async def llm(
    task: Task,
    ctx: Context,
    *,
    model: str | None = None,
    model_override: str | None = None,
    provider: str | None = None,
    provider_override: str | None = None,
    system_prompt: str | None = None,
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None,
    max_tokens: Annotated[int, Field(ge=1)] | None = None,
) -> str:
    """`*_override` are Shannon's spellings; what neither they nor the others say, the task's agent may. A provider named by
    the task is believed only when the address tells none.
    """
    endpoint = Endpoint.from_env(os.environ)
    wanted = model_override or model or task.llm_model or os.environ.get("OPENAI_MODEL")
    if not wanted:
        raise Failed("No model is named: give `model` in the task's context, or set OPENAI_MODEL for the worker.")
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": task.query}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    named = provider_override or provider or task.llm_provider
    # OpenAI's newer models refuse `max_tokens`; other endpoints know no other name.
    renamed = endpoint.provider == "openai"

    await ctx.checkpoint("pre_execution")
    answer = Answer()
    async with endpoint.client() as client:
        try:
            stream = await client.chat.completions.create(
                model=wanted,
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                reasoning_effort=cast("ReasoningEffort", task.llm_effort) if task.llm_effort else omit,
                temperature=omit if temperature is None else temperature,
                max_tokens=omit if renamed or max_tokens is None else max_tokens,
                max_completion_tokens=max_tokens if renamed and max_tokens is not None else omit,
            )
        except APIError as error:
            raise Failed(endpoint.explain(error, wanted)) from None
        async with stream:
            await answer.read(stream, ctx.delta)
        server = stream.response.headers.get("server", "")

    record(ctx, answer, endpoint, server=server, model=answer.model or wanted, given=named)
    return await conclude(ctx, answer, endpoint, wanted)


def record(ctx: Context, answer: "Answer", endpoint: "Endpoint", *, server: str, model: str, given: str | None) -> None:
    """Model, provider and what the endpoint reported as used."""
    # Only llama.cpp's own server calls itself so.
    provider = LLAMA_CPP if server == LLAMA_CPP else endpoint.provider or given or endpoint.name
    read, _, written = answer.tokens()
    price = answer.cost(provider=provider, model=model) or Decimal(0)
    ctx.used(model=model, provider=provider, input_tokens=read, output_tokens=written, cost_usd=float(price))


async def conclude(ctx: Context, answer: "Answer", endpoint: "Endpoint", wanted: str) -> str:
    """The whole text. Raises Failed or BrokenOffError when there is none, or not the whole."""
    name = endpoint.name
    # An error after the model's own end of the answer has spoilt nothing but the report of its usage.
    if answer.error and not answer.finish:
        if not isinstance(answer.error, APIError):
            raise Failed(f"The model endpoint {name} sent something that is not the OpenAI protocol.")
        if codes(answer.error) & FINAL:
            raise Failed(endpoint.explain(answer.error, wanted))
        raise BrokenOffError(f"The model endpoint {name} broke off its answer{endpoint.quote(answer.error)}.")
    if not answer.chunks:
        raise Failed(f"The model endpoint {name} streamed no answer: is OPENAI_BASE_URL its right address?")
    if not answer.finish:
        raise BrokenOffError(f"The model endpoint {name} ended its stream before the end of the answer.")
    if answer.finish == "content_filter":
        raise Failed(f"The content filter of the model endpoint {name} stopped the answer.")
    text = "".join(answer.parts)
    if not text.strip():
        raise Failed(f"The model {wanted} {answer.why_empty()}.")
    if answer.finish == "length":
        cut = "The answer stops early: it reached the limit of tokens."
        await ctx.emit("WARNING", cut, {"finish_reason": answer.finish})
    if answer.usage is None:
        await ctx.emit("WARNING", f"The model endpoint {name} did not report how many tokens it used.")
    return text


# The endpoint and its failures.


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    url: str
    key: str = field(default="", repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Endpoint":
        url = env.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
        key = env.get("OPENAI_API_KEY", "").strip()
        if not is_http(url):
            raise Failed("OPENAI_BASE_URL is no address such as http://127.0.0.1:8000/v1.")
        if not key and url == OPENAI_URL:
            raise Failed("OPENAI_API_KEY is not set. (An endpoint that wants no key is named by OPENAI_BASE_URL.)")
        if not (key.isascii() and key.isprintable()):
            raise Failed("OPENAI_API_KEY holds characters that no key has.")
        return cls(url=url, key=key)

    @property
    def name(self) -> str:
        """Host and port: an address may hold a password before them."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def loopback(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def provider(self) -> str:
        """Whose API this is, as genai-prices knows addresses; empty for one that it does not know."""
        try:
            return get_snapshot().find_provider(None, None, self.url).id
        except LookupError:
            return ""

    def client(self) -> AsyncOpenAI:
        """One for each task: closing it closes its connection, so that a cancelled model stops generating."""
        # A proxy of the environment cannot reach this machine's own loopback.
        http = DefaultAsyncHttpxClient(verify=trust(), trust_env=not self.loopback)
        return AsyncOpenAI(
            base_url=self.url,
            api_key=self.key or "none",  # the client insists on one; a server that wants none ignores it
            max_retries=RETRIES_MAX,
            http_client=http,
        )

    def explain(self, error: APIError, model: str) -> str:
        """One sentence for a person."""
        place, said = f"The model endpoint {self.name}", self.quote(error)
        if isinstance(error, APITimeoutError):
            return f"{place} did not answer in time{tries(error)}."
        if isinstance(error, APIConnectionError):
            return f"{place} cannot be reached{tries(error)}{said}."
        if codes(error) & TOO_LONG:
            return f"The task is too long for the model {model}{said}."
        if codes(error) & FILTERED:
            return f"The content filter of the model endpoint {self.name} refused the task."
        if codes(error) & NO_CREDIT:
            return f"The account at the model endpoint {self.name} has no credit left."
        status = error.status_code if isinstance(error, APIStatusError) else 0
        match status:
            # Without the endpoint's own words: they may repeat a part of the key.
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN if not self.key:
                return f"{place} wants a key ({status}): set OPENAI_API_KEY."
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                return f"{place} refused the key in OPENAI_API_KEY ({status})."
            case HTTPStatus.NOT_FOUND:
                return f"{place} knows no model {model}, or OPENAI_BASE_URL is not its address (404){said}."
            case HTTPStatus.TOO_MANY_REQUESTS:
                return f"{place} gets too many requests (429){tries(error)}{said}."
            case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return f"{place} fails ({status}){tries(error)}{said}."
            case _:
                return f"{place} refused the request ({status}){said}."

    def quote(self, error: APIError) -> str:
        """The endpoint's own words, after a colon; empty when it gave none."""
        said: object = error.__cause__
        if not isinstance(error, APIConnectionError):
            said = error.body.get("message") if isinstance(error.body, dict) else None
        words = str(said or "")
        if len(self.key) >= SECRET_CHARS_MIN:
            words = words.replace(self.key, "…")
        words = shortened(words).rstrip(".")
        return f": {words}" if words else ""


def is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        return False


def codes(error: APIError) -> set[str]:
    """OpenAI says it in `code`, llama.cpp in `type`."""
    return {said for said in (error.code, error.type) if said}


def tries(error: APIError) -> str:
    retries = int(error.request.headers.get("x-stainless-retry-count", "0"))
    return f" after {retries + 1} tries" if retries else ""


@functools.cache
def trust() -> ssl.SSLContext:
    """Made once: reading the certificates takes 30 ms in which the event loop stands still."""
    return httpx.create_ssl_context()


def shortened(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= QUOTE_CHARS_MAX else f"{line[:QUOTE_CHARS_MAX]}…"


# The answer.


@dataclass(kw_only=True)
class Answer:
    """What a stream said, so far or in all."""

    parts: list[str] = field(default_factory=list)
    refusal: str = ""
    finish: str = ""
    model: str = ""
    tier: str = ""
    usage: CompletionUsage | None = None
    chunks: int = 0
    error: Exception | None = None
    """Why it could not be read to its end. Kept, not raised: what came before is still to be sent."""

    async def read(self, stream: AsyncStream[ChatCompletionChunk], say: Say) -> None:
        try:
            async for chunk in stream:
                if text := self.take(chunk):
                    await say(text)
        # The client builds chunks from the endpoint's JSON unchecked, so odd JSON shows only here.
        except (APIError, ValueError, TypeError, AttributeError) as error:
            self.error = error

    def take(self, chunk: ChatCompletionChunk) -> str:
        """The chunk's text, when it has any."""
        self.chunks += 1
        self.model = chunk.model or self.model
        self.tier = chunk.service_tier or self.tier
        self.usage = chunk.usage or self.usage  # some endpoints repeat the sum so far in every chunk
        text = ""
        for choice in (chunk.choices or [])[:1]:
            self.finish = choice.finish_reason or self.finish
            if choice.delta:
                text = choice.delta.content or ""
                self.refusal += choice.delta.refusal or ""
        if text:
            self.parts.append(text)
        return text

    def why_empty(self) -> str:
        if self.refusal:
            return f"refused: {shortened(self.refusal).rstrip('.')}"
        if self.finish == "length":
            return "used up its tokens before its answer began"
        if self.finish in {"tool_calls", "function_call"}:
            return "asked for a tool, and none was offered to it"
        return "gave an empty answer"

    def tokens(self) -> tuple[int, int, int]:
        """Read, of these from a cache, and written; what was not reported counts as nothing."""
        usage = self.usage
        cached = usage.prompt_tokens_details.cached_tokens if usage and usage.prompt_tokens_details else None
        counts = (usage.prompt_tokens, cached, usage.completion_tokens) if usage else ()
        read, reread, written = (count if isinstance(count, int) and count > 0 else 0 for count in counts or (0, 0, 0))
        return read, min(reread, read), written

    def cost(self, *, provider: str, model: str) -> Decimal | None:
        """US dollars by the provider's price list, for the service tier that it reports; None: no such price is known."""
        if not any(known.id == provider for known in get_snapshot().providers):
            return None
        read, cached, written = self.tokens()
        usage = Usage(input_tokens=read, cache_read_tokens=cached, output_tokens=written)
        context = {"service_tier": self.tier} if self.tier else None
        try:
            return calc_price(usage, model, provider_id=provider, price_context=context).total_price
        except LookupError:
            return None
