"""What an operator may set: environment variables `TASKCAST_*`, or options of the command line, which win.

Read once at start and passed down; nothing else reads the environment.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TASKCAST_", frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address that the API binds to.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port of the API; 0 takes a free one.")
    data: Path = Field(default=Path(".taskcast"), description="Folder of the embedded store.")
    redis_url: str = Field(default="", description="A Redis ≥ 7.0 or Valkey to use instead of the embedded store.")
    processes: int = Field(default=1, ge=1, le=64, description="API processes that share the port.")
    keep_days: float = Field(
        default=0, ge=0, description="Delete tasks so many days after they ended; 0 keeps them for ever."
    )
    partitions: int = Field(
        default=0, ge=0, le=1024, description="Partitions of a new store (0: 1); fixed once it holds data."
    )
    fsync: Literal["everysec", "always"] = Field(
        default="everysec", description="How the embedded store syncs its log."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="From which on lines are logged; `info` has two for each task of a worker."
    )
    lease_seconds: float = Field(default=30, ge=0.5, le=3600, description="How long a silent worker keeps its task.")
    grace_seconds: float = Field(
        default=10,
        ge=0,
        le=600,
        description="How long a stopping process has; work is interrupted, and handed back, after half of it.",
    )
    heartbeat_seconds: float = Field(
        default=10, ge=0.1, le=300, description="Pause after which a silent stream sends a ping."
    )
    stream_backlog_bytes: int = Field(
        default=1024 * 1024, ge=1024, description="Unsent bytes after which a reader is cut off."
    )
    streams_per_key: int = Field(
        default=10_000, ge=1, description="Streams that one API key may have open in a process."
    )
    events_per_mark: int = Field(default=5000, ge=10, description="Events after which a task's stream may be trimmed.")
    bytes_per_mark: int = Field(
        default=8 * 1024 * 1024, ge=1024, description="Event bytes after which it may be trimmed."
    )
    log_entries: int = Field(default=100_000, ge=100, description="Entries that a partition's log keeps.")
    # Cut in 64 shares, each of which must hold the largest event.
    log_bytes: int = Field(
        default=256 * 1024 * 1024, ge=20 * 1024 * 1024, description="Bytes that a partition's log keeps."
    )
