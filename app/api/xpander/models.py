"""What xpander's clients may say, checked as its own server does: 422 names each place, in FastAPI's words.

`null` is as good as absent, and unknown keys are ignored (contract §1.7, §3.3). Texts that stand in key names are bounded
as the store bounds them; everything together by the size of a body.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams
from starlette.requests import Request

from app import events
from app.errors import Invalid
from app.events import Json
from app.requests import json_of, read_body
from app.task import text

BODY_BYTES_MAX = events.EVENT_BYTES_MAX
UPDATE_BYTES_MAX = 1024 * 1024
"""Of a PATCH: it brings the whole task, with a question and a result as large as may be."""
INPUT_SHOWN_MAX = 500
"""Bytes of a refused value that its refusal shows again."""
PER_PAGE_MAX = 50
OFFSET_MAX = 2**53 - 1
"""Numbers of Lua are exact up to here."""
INTERNAL_STATUS_MAX = 255

Word = Literal["pending", "executing", "paused", "error", "failed", "completed", "stopped"]
Effort = Literal["low", "medium", "high", "xhigh"]
Id = Annotated[str, Field(pattern=rf"^{events.ID.pattern}$")]
Short = Annotated[str, Field(max_length=256)]
Texts = Annotated[list[str], Field(fail_fast=True)]
"""Of a long list the first wrong item is told, not each: the answer would be fifty times the request."""

B = TypeVar("B", bound=BaseModel)


class Rejected(Invalid):
    """A request that does not fit its model; `places` are FastAPI's."""

    def __init__(self, places: list[Json]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, place['loc']))}: {place['msg']}" for place in places))
        self.places = places


class Model(BaseModel):
    model_config = ConfigDict(extra="ignore")


class User(Model):
    id: Short | None = None
    first_name: str | None = None
    last_name: str | None = None
    email: str
    additional_attributes: Json | None = None
    timezone: str | None = None
    role: str | None = None
    is_super_admin: bool | None = None


# What the SDK reads strictly: a worker that is sent anything else dies of it (tried), and the next one after it.


class Principal(Model):
    kind: Literal["user", "slack", "api_key", "system", "anonymous"]
    id: Annotated[str, Field(pattern=r"^[^:\s]+$", max_length=256)]
    email: str | None = None
    display_name: str | None = None


class Attachment(Model):
    url: str
    name: str | None = None
    mime: str | None = None
    size: int | None = None
    kind: Literal["image", "pdf", "document", "text", "audio", "video", "archive", "unknown"] | None = None
    sha256: str | None = None
    expires_at: str | None = None
    source: str | None = None
    transcript: str | None = None


class McpServer(Model):
    id: str | None = None
    type: Literal["local", "remote"] | None = None
    name: str | None = None
    command: str | None = None
    url: str | None = None
    transport: Literal["stdio", "sse", "streamable-http"] | None = None
    auth_type: Literal["api_key", "oauth2", "custom_headers", "sso_user", "none"] | None = None
    api_key: str | None = None
    use_secrets_manager: bool | None = None
    client_id: str | None = None
    client_secret: str | None = None
    headers: Json | None = None
    env_vars: Json | None = None
    allowed_tools: Texts | None = None
    additional_scopes: Texts | None = None
    share_user_token_across_other_agents: bool | None = None
    sso_token: Literal["access", "id", "exchange"] | None = None
    sso_audience: str | None = None


class Waits(Model):
    wait_node_id: str


class Connector(Model):
    connector_name: str
    auth_url: str


class Step(Model):
    id: str
    title: str
    completed: bool | None = None


class Plan(Model):
    enabled: bool | None = None
    enforce: bool | None = None
    started: bool | None = None
    question_raised: bool | None = None
    tasks: Annotated[list[Step], Field(fail_fast=True)] | None = None


def shaped(model: type[BaseModel]) -> AfterValidator:
    """A document that fits the model, as it was sent: also the keys that are nobody's."""

    def fits(value: Json) -> Json:
        model.model_validate(value, strict=True)
        return value

    return AfterValidator(fits)


class Input(Model):
    text: str | None = None
    files: Texts | None = None
    attachments: Annotated[list[Annotated[Json, shaped(Attachment)]], Field(fail_fast=True)] | None = None
    user: User | None = None
    principal: Annotated[Json, shaped(Principal)] | None = None


class Invocation(Model):
    """The body of `invoke` and of the SDK's create: a task, or the next turn of one."""

    input: Input
    id: Annotated[Id | None, BeforeValidator(lambda value: value or None)] = None
    payload_extension: Json | None = None
    parent_execution_id: Id | None = None
    worker_id: Id | None = None
    source: Short | None = None
    source_node_type: Short | None = None
    output_format: Literal["text", "markdown", "json", "voice"] | None = None
    output_schema: Json | None = None
    run_locally: bool | None = None
    additional_context: str | None = None
    expected_output: str | None = None
    title: str | None = None
    triggering_agent_id: Short | None = None
    events_streaming: bool | None = None
    mcp_servers: Annotated[list[Annotated[Json, shaped(McpServer)]], Field(fail_fast=True)] | None = None
    think_mode: Literal["default", "harder"] | None = None
    disable_attachment_injection: bool | None = None
    instructions_override: str | None = None
    test_run_node_id: str | None = None
    user_tokens: Json | None = None
    user_oidc_token: str | None = None
    return_metrics: bool | None = None
    voice_id: str | None = None
    llm_model_provider: Short | None = None
    llm_model_name: Short | None = None
    llm_reasoning_effort: Effort | None = None
    tool_call_limit: int | None = None
    harness_cli: str | None = None
    permission_mode: Literal["full", "gated"] | None = None


Count = Annotated[int, Field(ge=0, le=2**53 - 1), BeforeValidator(lambda value: 0 if value is None else value)]


class Tokens(Model):
    completion_tokens: Count = 0
    prompt_tokens: Count = 0


def _as_text(value: Any) -> Any:
    """A handler may leave anything in a field that is a text."""
    return value if value is None or isinstance(value, str) else text(value)


def _as_texts(value: Any) -> Any:
    return [_as_text(one) for one in value if one is not None] if isinstance(value, list) else None


def _as_seconds(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None


Said = Annotated[str | None, BeforeValidator(_as_text)]


class Update(Model):
    """A PATCH: a few fields, or a whole task as the SDK last saw it. Which ones were sent, `model_fields_set` says.

    Nothing is refused that can be kept: a worker whose last PATCH is refused has lost its result, and nobody hears of it.
    """

    status: Word | None = None
    result: Said = None
    internal_status: Annotated[Said, AfterValidator(lambda value: value and value[:INTERNAL_STATUS_MAX])] = None
    """Cut off at INTERNAL_STATUS_MAX characters."""
    title: Said = None
    source: Said = None
    tokens: Tokens | None = None
    last_executed_node_id: str | None = None
    deep_planning: Annotated[Json, shaped(Plan)] | None = None
    hitl_request: Annotated[Json, shaped(Waits)] | None = None
    pending_eca_request: Annotated[Json, shaped(Connector)] | None = None
    payload_extension: Json | None = None
    tool_call_payload_extension: Json | None = None
    additional_context: str | None = None
    used_tools: Annotated[list[str] | None, BeforeValidator(_as_texts)] = None
    used_mutating_tools: bool | None = None
    duration: Annotated[float | None, BeforeValidator(_as_seconds)] = None


class Report(Model):
    """A task that ran elsewhere (contract §3.3)."""

    id: Annotated[Id | None, BeforeValidator(lambda value: value or None)] = None
    input: str | None = None
    llm_response: Any = None
    tokens: Tokens | None = None
    is_success: bool | None = None
    result: str | None = None
    duration: Annotated[float, Field(ge=0, le=10 * 366 * 86400)] | None = None
    used_tools: Texts | None = None


class Counted(Model):
    worker: Tokens | None = None


class Metrics(Model):
    """Of what the SDK reports of an execution, what is kept; the rest is its own statistics."""

    execution_id: str | None = None
    status: str | None = None
    ai_model: str | None = None
    duration: float | None = None
    llm_tokens: Counted | None = None


class Pushed(Model):
    """An event that a worker pushes."""

    type: Short
    data: Any = None


class Listing(Model):
    """The query of a list. Filters that are not given do not narrow it, and one that no task could meet finds none."""

    user_id: str | None = None
    parent_task_id: str | None = None
    agent_id: str | None = None
    triggering_agent_id: str | None = None
    internal_status: str | None = None
    status: Word | None = None


class Pages(Model):
    page: Annotated[int, Field(ge=1)] = 1
    per_page: Annotated[int, Field(ge=1, le=PER_PAGE_MAX)] = 20

    @property
    def offset(self) -> int:
        """A page beyond the end is an empty one, however far (§1.1)."""
        return min((self.page - 1) * self.per_page, OFFSET_MAX)

    def envelope(self, items: list[Json], total: int) -> Json:
        """The answer that holds this page (§2.3)."""
        numbers = {"total": total, "page": self.page, "per_page": self.per_page}
        return {"items": items, **numbers, "total_pages": -(-total // self.per_page)}


class Paging(Listing, Pages):
    from_date: datetime | None = None
    to_date: datetime | None = None
    cursor: Short | None = None
    """Ours: what the page before answered as `next_cursor`; empty begins with the newest."""


class Decision(Model):
    """Ours, for upstream says nothing of these bodies (contract §3.6)."""

    feedback: str | None = None
    payload: Json | None = None


async def body_of(request: Request, model: type[B], *, empty: bool = False, most: int = BODY_BYTES_MAX) -> B:
    """Raises Rejected, TooLarge. `empty`: no body is one without fields."""
    raw = await read_body(request, most)
    return checked(model, _json_of(raw, empty=empty), "body")


async def list_of(request: Request, model: type[B]) -> list[B]:
    """Of a body that is an array. Raises Rejected, TooLarge."""
    raw = _json_of(await read_body(request, BODY_BYTES_MAX), empty=False)
    if not isinstance(raw, list):
        raise Rejected([wrong(("body",), "list_type", "Input should be a valid list", raw)])
    return [checked(model, one, "body", i) for i, one in enumerate(raw)]


def query_of(params: QueryParams, model: type[B]) -> B:
    """Raises Rejected."""
    return checked(model, dict(params), "query")


def id_of(request: Request, name: str) -> str:
    """Of a path. Raises Rejected."""
    value: str = request.path_params[name]
    if not events.ID.fullmatch(value):
        sentence = f"String should match pattern '^{events.ID.pattern}$'"
        raise Rejected([wrong(("path", name), "string_pattern_mismatch", sentence, value)])
    return value


def checked(model: type[B], raw: Any, *place: str | int) -> B:
    """Raises Rejected."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        places = [wrong((*place, *one["loc"]), one["type"], one["msg"], one["input"]) for one in found]
        raise Rejected(places) from error


def _json_of(raw: bytes, *, empty: bool) -> Any:
    if not raw:
        if empty:
            return {}
        raise Rejected([wrong(("body",), "missing", "Field required", None)])
    try:
        return json_of(raw)
    except Invalid as error:
        sentence = str(error).removeprefix("Invalid request body: ")
        raise Rejected([wrong(("body",), "json_invalid", f"JSON decode error: {sentence}", {})]) from error


def wrong(loc: tuple[str | int, ...], kind: str, sentence: str, said: Any) -> Json:
    told: Json = {"type": kind, "loc": [*loc], "msg": sentence}
    try:
        shown = msgspec.json.encode(said)
    except (TypeError, ValueError, RecursionError):
        return told
    return {**told, "input": said} if len(shown) <= INPUT_SHOWN_MAX else told
