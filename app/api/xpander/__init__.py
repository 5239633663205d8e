"""xpander.ai's task API over the store: its documents' REST, and the controller that an unmodified `xpander-sdk` calls.

    models.py       what its clients may say, and the 422 that they get otherwise
    spelling.py     its request → our submission; our task, event, error → its JSON. Pure; start here
    paths.py        /v1, and the controller's paths in all their spellings
    tasks.py        /v1/tasks, /v1/agents/{id}/tasks: lists, one task, its conversation, stop, delete, decisions
    invoke.py       /v1/agents/{id}/invoke, /v1/workflows/{id}/invoke: waiting, at once, or as a stream
    agents.py       /v1/agents, /agents: who may be invoked
    executions.py   /agent-execution and its neighbours, where DELETE stops: what the SDK calls
    workers.py      /events: the stream that brings the SDK's workers their tasks, and their heartbeats

The names below are the same in every dialect, in this order; no dialect imports another.
"""

from app.api.xpander import agents, executions, invoke, tasks, workers
from app.api.xpander.paths import Paths, speaks
from app.api.xpander.spelling import STATUS, control, error_body, frame, submission, task_body

routes = [*tasks.routes, *invoke.routes, *agents.routes, *executions.routes, *workers.routes]

__all__ = ["STATUS", "Paths", "control", "error_body", "frame", "routes", "speaks", "submission", "task_body"]
