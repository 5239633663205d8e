"""Taskcast: an event-driven task store for AI agents, with live streams.

    clients ──POST──▶ api/<dialect> ──▶ store.submit ──┐
                                                       ├─▶ lua/commit.lua, one atomic step ─┬─▶ partition log
    workers ──claim, events──▶ store.append ───────────┘                                    ├─▶ the task's stream
                                                                                            ├─▶ its snapshot
                                                                                            └─▶ indexes, queues
    EventSource ◀── direct or sse ◀── api/<dialect>.frame ◀── seam ◀── hub ◀── one tail per partition
    pollers     ◀── api/<dialect>.task_body ◀── snapshots

The log is the truth; a snapshot is its fold. Imports point one way, and a test holds it:

    core     errors events task schema       pure, no I/O
    leaves   keys settings metrics
    Redis    embedded line connect log snapshots queues agents registrations seam crowd tail hub
    store                                    above it nobody says Redis, below it nobody says HTTP
    HTTP     identity claims frames streams direct sse api ops
    edge     edge protocol server                     the application and its process
             cli local remote screen supervisor
"""

__version__ = "0.1.0"
