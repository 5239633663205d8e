"""What can go wrong, as a tree; each leaf has a machine code, each instance a sentence for a person.

    TaskcastError
    ├── Invalid            the request itself is wrong
    │   └── TooLarge       a stated limit is exceeded
    ├── Unauthorized       no key, or one that nobody knows
    ├── Forbidden          a good key, but not for this
    ├── Gone               a cursor's events are not kept any more, and the caller wants no less than all
    ├── NotFound           no such task here, or one of another organisation
    ├── Conflict           right request, wrong moment: the transition table refuses it
    │   ├── Stale          a worker speaks with a fence that is no longer the task's
    │   └── OutOfOrder     a worker skipped a producer number
    ├── Unavailable        the store cannot be reached
    │   └── Full           the store refuses to grow
    └── Misconfigured      start-up found something that only an operator can mend

Dialects spell these (`error_body`); nothing matches on the sentence.
"""

from typing import ClassVar


class TaskcastError(Exception):
    code: ClassVar[str] = "internal"


class Invalid(TaskcastError):
    code = "invalid"


class TooLarge(Invalid):
    code = "too_large"


class Unauthorized(TaskcastError):
    code = "unauthorized"


class NotFound(TaskcastError):
    code = "not_found"


class Forbidden(TaskcastError):
    code = "forbidden"


class Gone(TaskcastError):
    """`earliest` and `latest` are the numbers that a task still has; 0 on a stream of many tasks."""

    code = "gone"

    def __init__(self, reason: str, earliest: int = 0, latest: int = 0) -> None:
        super().__init__("The cursor's events are no longer kept, or were never here.")
        self.reason, self.earliest, self.latest = reason, earliest, latest


class Conflict(TaskcastError):
    """`status` is the task's present canonical status, or empty when the conflict is not about it."""

    code = "conflict"

    def __init__(self, sentence: str, status: str = "") -> None:
        super().__init__(sentence)
        self.status = status


class Stale(Conflict):
    code = "stale"


class OutOfOrder(Conflict):
    code = "out_of_order"


class Unavailable(TaskcastError):
    code = "unavailable"


class Full(Unavailable):
    code = "full"


class Misconfigured(TaskcastError):
    code = "misconfigured"
