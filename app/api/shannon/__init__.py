"""Shannon's HTTP API over the store: an unmodified `shannon-sdk` works against it.

    spelling.py   its request → our submission; our task, event, error → its JSON. Pure; start here
    tasks.py      /api/v1/tasks: submit, get, list, events, timeline, cancel, pause, resume, retry, control-state,
                  delete
    agents.py     /api/v1/agents: who may be asked by name, and asking
    approvals.py  /api/v1/approvals: what waits for a human, and the decision
    reviews.py    /api/v1/tasks/{id}/review: a plan, what a human says of it, and the next plan
    streams.py    /api/v1/stream/sse and /ws, /api/v1/tasks/{id}/stream
    sessions.py   /api/v1/sessions: every task with that session id of its owner

The names below are the same in every dialect, in this order; no dialect imports another. Not spoken, and so answered
404 as JSON: schedules, skills, tools, swarm, files, /auth, the OpenAI front.
"""

from app.api.shannon import agents, approvals, reviews, sessions, streams, tasks
from app.api.shannon.spelling import STATUS, control, error_body, frame, submission, task_body

routes = [*tasks.routes, *agents.routes, *approvals.routes, *reviews.routes, *streams.routes, *sessions.routes]

__all__ = ["STATUS", "control", "error_body", "frame", "routes", "submission", "task_body"]
