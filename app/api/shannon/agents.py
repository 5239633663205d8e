"""Agents over HTTP (contract §1.15): the organisation's records, and tasks for one of them.

Upstream's agents are tools with a price and a schema. Ours are workers with a model: whoever names one that nobody knows
makes it known. What upstream tells of an agent and we do not know is empty.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.agents import Agent
from app.answers import clock
from app.api.shannon.tasks import accept, number
from app.errors import Invalid, NotFound
from app.events import Json
from app.identity import caller
from app.requests import reply, store_of

LIMIT_MAX = 1000


def agent_body(agent: Agent) -> Json:
    return {
        "id": agent.id,
        "name": agent.name,
        "description": "",
        "category": "",
        "tool": "",
        "input_schema": {},
        "cost_per_call": 0.0,
        "provider": agent.provider,
        "model": agent.model,
        "effort": agent.effort,
        "queue": agent.queue,
        "version": agent.version,
    }


def agent_id(request: Request) -> str:
    """Raises Invalid."""
    id_: str = request.path_params["agent_id"]
    if not events.ID.fullmatch(id_):
        raise Invalid("Invalid agent ID format")
    return id_


async def list_agents(request: Request) -> Response:
    """Oldest first; `count` is how many there are. Its SDK asks for no page, and gets the first LIMIT_MAX."""
    who = caller(request)
    limit = number(request, "limit", LIMIT_MAX, least=1, most=LIMIT_MAX)
    offset = number(request, "offset", 0)
    found, total = await store_of(request).agents.list(who.org, offset=offset, limit=limit)
    return reply({"agents": [agent_body(agent) for agent in found], "count": total})


async def get(request: Request) -> Response:
    found = await store_of(request).agents.get(caller(request).org, agent_id(request))
    if found is None:
        raise NotFound("Agent not found")
    return reply(agent_body(found))


async def execute(request: Request) -> Response:
    """A task for the agent, in its queue. 202, also when its stream is asked for: the SDK follows it by the task's id."""
    id_ = agent_id(request)
    accepted = await accept(request, id_)
    body = {
        "task_id": accepted.task,
        "workflow_id": accepted.task,
        "agent_id": id_,
        "status": "STATUS_CODE_OK",
        "created_at": clock(accepted.at),
    }
    return reply(body, 202, accepted.headers)


routes = [
    Route("/api/v1/agents", list_agents, methods=["GET"]),
    Route("/api/v1/agents/{agent_id}", get, methods=["GET"]),
    Route("/api/v1/agents/{agent_id}", execute, methods=["POST"]),
]
