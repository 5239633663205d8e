"""xpander.ai's task API over the store: its documents' REST, and the controller that an unmodified `xpander-sdk` calls.

    models.py       what its clients may say, and the 422 that they get otherwise
    spelling.py     its request → our submission; our task, event, error → its JSON. Pure; start here

The names below are the same in every dialect, in this order; no dialect imports another.
"""

from app.api.xpander.spelling import STATUS, control, error_body, frame, submission, task_body

__all__ = ["STATUS", "control", "error_body", "frame", "submission", "task_body"]
