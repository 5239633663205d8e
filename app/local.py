"""The verbs that run here, on the store itself: serve, worker, keys, verify, rebuild.

They read the settings (`TASKCAST_*`, options win) and open the store. `remote.py` holds the verbs that speak HTTP.
"""

import asyncio
import fcntl
import os
import shlex
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from app import __version__
from app.errors import Misconfigured
from app.identity import Identities
from app.server import run as run_api
from app.settings import Settings
from app.store import Store, open_store
from app.supervisor import Child, GaveUp, Supervisor, supervisor
from workers import runtime
