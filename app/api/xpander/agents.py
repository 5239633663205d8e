"""Agents: who may be invoked. Made on first use, or by `taskcast agents`; here they are only looked at.

The SDK needs more keys than we know of an agent (contract §3.6): its tools and graph live in its own worker.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.agents import Agent
from app.answers import clock
from app.api.xpander.models import Pages, id_of, query_of
from app.api.xpander.paths import member
from app.errors import NotFound
from app.events import Json
from app.requests import reply, store_of

LISTED_MAX = 1000
"""Of an answer that has no pages: the oldest."""


def agent_body(agent: Agent) -> Json:
    return {
        "id": agent.id,
        "organization_id": agent.org,
        "name": agent.name,
        "unique_name": agent.id,
        "status": "ACTIVE",
        "framework": "agno",
        "model_provider": agent.provider,
        "model_name": agent.model,
        "llm_reasoning_effort": agent.effort or None,
        "queue": agent.queue,
        "version": agent.version,
        "created_at": clock(agent.created_at),
        "updated_at": clock(agent.updated_at),
        "graph": [],
        "tools": [],
    }


async def get(request: Request) -> Response:
    """The latest version, whichever `x-agent-version` asks for: older ones are not kept."""
    store, who = store_of(request), member(request)
    found = await store.agents.get(who.org, id_of(request, "agent_id"))
    if found is None:
        raise NotFound("Agent not found")
    return reply(agent_body(found), 200, {"x-agent-version": str(found.version)})


async def list_agents(request: Request) -> Response:
    store, who = store_of(request), member(request)
    asked = query_of(request.query_params, Pages)
    found, total = await store.agents.list(who.org, offset=asked.offset, limit=asked.per_page)
    return reply(asked.envelope([agent_body(agent) for agent in found], total))


async def every_agent(request: Request) -> Response:
    """The controller's, a plain array."""
    store, who = store_of(request), member(request)
    found, total = await store.agents.list(who.org, offset=0, limit=LISTED_MAX)
    return reply([agent_body(agent) for agent in found], 200, {"X-Total-Capped": "true"} if total > LISTED_MAX else {})


routes = [
    Route("/v1/agents", list_agents, methods=["GET"]),
    Route("/v1/agents/{agent_id}", get, methods=["GET"]),
    Route("/agents/list", every_agent, methods=["GET"]),
    Route("/agents/{agent_id}", get, methods=["GET"]),
]
