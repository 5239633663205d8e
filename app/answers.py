"""What the answers of all HTTP surfaces have in common: the status of an error, the sentence that may be told, times."""

from datetime import UTC, datetime, timedelta
from functools import lru_cache

from app import errors
from app.errors import TaskcastError

STATUS: dict[type[TaskcastError], int] = {
    errors.Invalid: 400,
    errors.TooLarge: 413,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.Gone: 410,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Unavailable: 503,
}
"""As RFC 9110 means them; a subclass without a line of its own has its parent's."""


def plain(error: TaskcastError) -> tuple[int, str]:
    """Total: what nobody foresaw is a 500 that tells nothing of the inside."""
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    if status == 500:
        return status, "Internal server error"
    if isinstance(error, errors.Unauthorized):
        return status, "Unauthorized"
    if isinstance(error, errors.Unavailable) and not isinstance(error, errors.Full):
        return status, "The store cannot be reached; try again."  # its own sentence may name a socket or a host
    return status, str(error)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def clock(micros: int) -> str:
    """RFC 3339 in UTC, always with six digits, so that texts compare like times."""
    return f"{_second(micros // 1_000_000)}.{str(micros % 1_000_000).zfill(6)}Z"


def moment(micros: int) -> str | None:
    """As `clock`; None: it never was."""
    return clock(micros) if micros else None


@lru_cache(maxsize=256)
def _second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()
