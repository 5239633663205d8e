"""The paths of this dialect: `/v1/…`, and the controller's, which the SDK spells in several ways.

It joins `/{organisation}` to some of its addresses and not to others, puts `/agent-controller` before that when the base
URL has it, doubles a slash when that ends with one, and ends some paths with one (contract §3.1, §3.5). Routes see
`/agent-execution/…` whatever was asked.
"""

import re

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import NotFound
from app.identity import Identity, caller

NOUNS = ("agent-execution", "events", "agents-metrics", "activity", "agents", "hitl")
_NOUN = f"(?:{'|'.join(NOUNS)})"
_CONTROLLER = re.compile(
    rf"/+(?!(?:v1|api|worker)/)(?:agent-controller/+)?(?:(?!{_NOUN}/)([^/]+)/+)?({_NOUN}(?:/.*)?)", re.DOTALL
)
"""An organisation with the name of another surface, or of a noun, is reached without a prefix: tasks and agents may have
such names."""
_ORG = "taskcast.org"


def speaks(path: str) -> bool:
    """Whether this dialect answers there, be it with 404."""
    return path.startswith(("/v1/", *(f"/{noun}/" for noun in NOUNS)))


class Paths:
    """Gives each of the controller's paths its one spelling; stands before everything that looks at paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (found := _CONTROLLER.fullmatch(scope["path"])):
            scope[_ORG] = found[1]
            scope["path"] = "/" + re.sub("/+", "/", found[2]).removesuffix("/")
        await self._app(scope, receive, send)


def member(request: HTTPConnection) -> Identity:
    """Who asks, below the path of no other organisation. Raises as `identity.caller`, and NotFound."""
    who = caller(request)
    if request.scope.get(_ORG) not in {None, who.org}:
        raise NotFound("Organization not found")
    return who
