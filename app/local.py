"""The verbs that run here, on the store itself: serve, worker, keys, agents, verify, rebuild. `remote.py` has the others.

They read the settings (`TASKCAST_*`; options win) and open the store themselves. The file is long because each verb says
its own settings, errors and screens; what runs child processes is in `supervisor.py`.
"""

import asyncio
import fcntl
import re
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import httpx
import typer
import uvloop
from msgspec import Struct
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from app import __version__
from app.agents import EFFORTS, Agent
from app.errors import Misconfigured, TaskcastError
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER, Identities, Key, loopback
from app.ops import counted_together
from app.remote import HERE
from app.screen import print_columns
from app.server import collect_rarely, configure_logs, listen
from app.server import run as run_api
from app.settings import Settings
from app.snapshots import Difference
from app.store import Store, open_store
from app.supervisor import Child, Stopped, Supervisor, supervisor
from workers import model as model_server
from workers import runtime
from workers.handlers import by_queue, load

T = TypeVar("T")

POLL_SECONDS = 0.05
"""Between two questions whether the API answers yet."""

cli = typer.Typer()
store_cli = typer.Typer()
keys_cli = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
agents_cli = typer.Typer(help="Say what tasks of an agent are done with, unless they say so.", no_args_is_help=True)

Data = Annotated[Path | None, Option("--data", help="Folder of the embedded store [TASKCAST_DATA; .taskcast].")]
RedisUrl = Annotated[
    str | None, Option("--redis", metavar="URL", help="A Redis or Valkey instead of it [TASKCAST_REDIS_URL].")
]


def settings_of(**options: Any) -> Settings:
    """Raises Misconfigured, in words of the command line."""
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        source = f"--{name.removesuffix('_url').replace('_', '-')}"
        if options.get(name) is None:
            source = f"TASKCAST_{name.upper()}"
        raise Misconfigured(f"{source} must be {_meant(name)}, not {str(first['input'])!r}.") from error


def _meant(name: str) -> str:
    """What a setting takes, in words."""
    field = Settings.model_fields[name]
    if choices := get_args(field.annotation):
        return " or ".join(choices)
    least, most = (
        next((getattr(one, side) for one in field.metadata if hasattr(one, side)), None) for side in ("ge", "le")
    )
    kind = "a whole number" if field.annotation is int else "a number" if field.annotation is float else "text"
    if least is not None and most is not None:
        return f"{kind} from {least} to {most}"
    return kind if least is None else f"{kind} of at least {least}"


def _say_if_new(settings: Settings) -> None:
    """A wrong folder looks like a store that lost everything."""
    if not settings.redis_url and not (settings.data / "users").exists():
        sys.stderr.write(f"{settings.data.absolute()} is a new, empty store; --data names another folder.\n")


def run(main: Coroutine[Any, Any, T], *, fast: bool = False) -> T:
    """Runs it to its end. SIGTERM cancels it, so that the store is left in good order."""

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if fast else None) as runner:
        return runner.run(cancellable())


# serve


class Part(Struct, frozen=True, kw_only=True):
    """A line of the welcome, and the processes behind it."""

    label: str
    what: str
    note: str
    children: tuple[Child, ...] = ()


@cli.command(rich_help_panel="Server")
def serve(
    host: Annotated[str | None, Option(help="Address to bind to [TASKCAST_HOST; 127.0.0.1].")] = None,
    port: Annotated[
        str | None, Option(metavar="INTEGER", help="Port; 0 takes a free one [TASKCAST_PORT; 8080].")
    ] = None,
    data: Data = None,
    redis: RedisUrl = None,
    processes: Annotated[
        str | None, Option(metavar="INTEGER", help="API processes that share the port [TASKCAST_PROCESSES; 1].")
    ] = None,
    keep_days: Annotated[
        str | None,
        Option(metavar="FLOAT", help="Delete tasks so long after they ended; 0: never [TASKCAST_KEEP_DAYS; 0]."),
    ] = None,
    no_worker: Annotated[bool, Option("--no-worker", help="Without the demo worker.")] = False,
    llm: Annotated[bool, Option("--llm", help="With a small local language model that answers the tasks.")] = False,
) -> None:
    """Run everything: the store, the API and a demo worker. Ctrl-C stops all of it."""
    if no_worker and llm:
        raise Misconfigured("--no-worker and --llm contradict each other.")
    settings = settings_of(host=host, port=port, data=data, redis_url=redis, processes=processes, keep_days=keep_days)
    configure_logs("warning")  # for a person: only what goes wrong
    with suppress(asyncio.CancelledError):  # stopped while it started
        run(_serve(settings, worker=not no_worker, llm=llm))


async def _serve(settings: Settings, *, worker: bool, llm: bool) -> None:
    """Raises Misconfigured, Unavailable, GaveUp."""
    screen = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        # Nobody listens any more: rich would end the program, but that is no reason to let a child go.
        with suppress(OSError, SystemExit):
            screen.print(Text(line, style="yellow"))

    # The supervisor binds the port and shares the socket: a port in use is found before anything starts, and whoever
    # connects while an API process starts again waits, instead of being refused.
    with listen(settings) as sock, counted_together(settings.processes) as together:
        settings = settings.model_copy(update={"port": sock.getsockname()[1]})
        url = url_of(settings)
        async with (
            open_store(settings) as store,
            supervisor(say, grace_seconds=settings.grace_seconds) as kept,
        ):
            try:
                first = [_api(settings, sock, url, together), *([_model(settings)] if llm else [])]
                await kept.start(*(child for part in first for child in part.children))
                then = _workers(settings, model=first[-1].what if llm else "") if worker else []
                await kept.start(*(child for part in then for child in part.children))
                await kept.unless_over(_answers(url))
                parts = [*first, await _data(store), *then, _key(store)]
                screen.print(_welcome(parts, kept, url, development=parts[-1].what == DEVELOPMENT_KEY))
                await kept.over()
            except Stopped:
                if worker and await _running(store):
                    seconds = f"{settings.grace_seconds:g} s"
                    say(f"Stopping: running tasks get up to {seconds}; Ctrl-C again ends at once.")
                raise
            finally:
                sock.close()  # ours: whoever connects while the children stop is refused


async def _running(store: Store) -> int:
    """Tasks; 0 when the store does not say so at once."""
    with suppress(TaskcastError, TimeoutError):
        async with asyncio.timeout(1):
            return await store.queues.running()
    return 0


def _api(settings: Settings, sock: socket.socket, url: str, together: Mapping[str, str]) -> Part:
    count = settings.processes
    children = tuple(
        Child(
            name="The API" if count == 1 else f"API process {number}",
            module="app.cli",
            arguments=("api", "--socket", str(sock.fileno())),
            environment={**environment(settings), **together},
            descriptors=(sock.fileno(),),
        )
        for number in range(1, count + 1)
    )
    note = "on this machine only" if loopback(settings.host) else f"bound to {settings.host}"
    return Part(label="API", what=url, note=note, children=children)


def _model(settings: Settings) -> Part:
    model_server.find_weights()  # or it says what to install
    # Chosen here, so that it is the same after a restart.
    with listen(Settings(host="127.0.0.1", port=0)) as probe:
        port = probe.getsockname()[1]
    child = Child(
        name="The local model",
        module="workers.model",
        arguments=("--port", str(port)),
        environment=environment(settings),
        ready="model: ",
    )
    return Part(label="Model", what=f"http://127.0.0.1:{port}/v1", note="local", children=(child,))


def _workers(settings: Settings, *, model: str) -> list[Part]:
    served = {"workers.echo": "default,agent:echo"}
    if model:
        served = {"workers.llm": "default,agent:llm", "workers.echo": "agent:echo"}
    local = {"OPENAI_BASE_URL": model, "OPENAI_API_KEY": "local", "OPENAI_MODEL": model_server.NAME} if model else {}
    return [
        Part(
            label="Worker",
            what=module,
            note=f"on {queues.replace(',', ' and ')}",
            children=(
                Child(
                    name=f"The worker {module}",
                    module="app.cli",
                    arguments=("worker", module, "--queues", queues),
                    environment=environment(settings) | local,
                ),
            ),
        )
        for module, queues in served.items()
    ]


async def _data(store: Store) -> Part:
    settings, tasks = store.settings, await store.snapshots.count()
    kept = f"{settings.keep_days:g} days after they end" if settings.keep_days else "for ever"
    note = f"{tasks:,} task{'' if tasks == 1 else 's'}, kept {kept}"
    if store.embedded:
        return Part(label="Data", what=str(settings.data), note=f"{size_of(settings.data)}, {note}")
    return Part(label="Data", what=without_password(settings.redis_url), note=note)


def _key(store: Store) -> Part:
    if Identities(store, store.settings).development:
        return Part(label="Key", what=DEVELOPMENT_KEY, note="the development key")
    place = f"--data {shlex.quote(str(store.settings.data))}" if store.embedded else "--redis URL"
    return Part(label="Key", what="needed", note=f"`taskcast keys create {place}` makes one")


def _welcome(parts: Sequence[Part], kept: Supervisor, url: str, *, development: bool) -> Text:
    width = max(len(part.what) for part in parts)
    text = Text.assemble("\n", (f"Taskcast {__version__} runs.", "bold green"), "\n\n")
    for part in parts:
        pids = [str(kept.pid(child.name)) for child in part.children]
        note = part.note + (f", process{'es' if len(pids) > 1 else ''} {', '.join(pids)}" if pids else "")
        text.append(f"  {part.label:<8}", "bold").append(f"{part.what:<{width}}", "cyan").append(f"  {note}\n", "dim")
    if development:
        at = "" if url == HERE else f" --url {url}"
        text.append(
            f"\nThe development key {DEVELOPMENT_KEY} is accepted here, because only this machine can reach the API\n"
            "and its store is embedded. Any other start needs a key made by `taskcast keys create`.\n"
            "\nSubmit a task and see it live; with curl, submit one:\n\n"
        )
        text.append(f"  {_command()} submit 'What is an event?' --watch{at}\n", "cyan")
        header, body = f"-H 'X-API-Key: {DEVELOPMENT_KEY}'", """-d '{"query": "What is an event?"}'"""
        text.append(f"  curl {url}/api/v1/tasks {header} {body}\n", "cyan")
    return text.append("\nCtrl-C stops all of it.", "dim")


def url_of(settings: Settings) -> str:
    """Where this machine reaches the API."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def environment(settings: Settings) -> dict[str, str]:
    """The settings, for a child."""
    values = settings.model_copy(update={"data": settings.data.absolute()}).model_dump(mode="json")
    return {f"TASKCAST_{name.upper()}": str(value) for name, value in values.items()}


def _command() -> str:
    """As the user may type it."""
    here = Path(sys.argv[0]).absolute()
    if shutil.which("taskcast") == str(here):
        return "taskcast"
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)


def size_of(folder: Path) -> str:
    size = float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"


def without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//…@", url)


async def _answers(url: str) -> None:
    """Returns when it does."""
    async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
        while True:
            with suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).is_success:
                    return
            await asyncio.sleep(POLL_SECONDS)


@cli.command(hidden=True)
def api(descriptor: Annotated[int, Option("--socket", help="The listening socket that it inherits.")]) -> None:
    """One API process, as `serve` starts it."""
    raise typer.Exit(run_api(Settings(), sock=socket.socket(fileno=descriptor)))


# worker


@cli.command(rich_help_panel="Server")
def worker(
    modules: Annotated[list[str], Argument(metavar="MODULE…", help="Python modules with @task functions.")],
    queues: Annotated[str, Option(help="Serve only these, with commas; all that the modules name when absent.")] = "",
    slots: Annotated[int, Option(min=1, max=10_000, help="Tasks at the same time.")] = 10,
    data: Data = None,
    redis: RedisUrl = None,
) -> None:
    """Run the workers of a module on the same store. Ctrl-C lets their tasks end, then stops."""
    settings = settings_of(data=data, redis_url=redis)
    configure_logs(settings.log_level)
    served = _split(queues)
    with suppress(asyncio.CancelledError):  # told to stop while the store opened: nothing had begun
        run(_work(settings, modules, served, slots), fast=True)


def _split(queues: str) -> list[str]:
    return [queue.strip() for queue in queues.split(",") if queue.strip()]


async def _work(settings: Settings, modules: Sequence[str], queues: Sequence[str], slots: int) -> None:
    handlers = load(modules)
    by_queue(handlers, queues)  # before anything is opened
    _say_if_new(settings)
    stop = asyncio.Event()
    async with open_store(settings) as store:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        collect_rarely()
        await runtime.run(store, handlers, stop=stop, queues=queues, slots=slots)


# keys


@keys_cli.command()
def create(
    name: Annotated[str, Option(help="What it is for.")] = "",
    org: Annotated[str, Option(help="Organisation: who sees whose tasks.")] = DEVELOPMENT_ORG,
    user: Annotated[str, Option(help="User: whose tasks they are; empty: nobody's.")] = DEVELOPMENT_USER,
    worker: Annotated[bool, Option("--worker", help="For workers over HTTP, and for nothing else.")] = False,
    queues: Annotated[str, Option(help="With --worker: only these, with commas; all when absent.")] = "",
    data: Data = None,
    redis: RedisUrl = None,
) -> None:
    """Make a key and print it. It is shown once: the store keeps only its hash."""
    if queues and not worker:
        raise Misconfigured("--queues needs --worker: other keys do not work on queues.")

    async def main(store: Store) -> str:
        named = _split(queues)
        return await Identities(store, store.settings).create(org, user, name, worker=worker, queues=named)

    settings = settings_of(data=data, redis_url=redis)
    _say_if_new(settings)
    key = _on_store(main, settings)
    if sys.stdout.isatty():
        sys.stderr.write("It is shown this once; the store keeps only its hash.\n")
    sys.stdout.write(f"{key}\n")


@keys_cli.command("list")
def list_keys(data: Data = None, redis: RedisUrl = None) -> None:
    """List the keys, oldest first: their ids, not themselves."""

    async def main(store: Store) -> list[Key]:
        return await Identities(store, store.settings).list()

    found = _on_store(main, existing(data=data, redis_url=redis))
    if not found:
        sys.stdout.write("There are no keys. `taskcast keys create` makes one.\n")
        return
    rows = [[key.id, _local(key.created_at), _scope(key), key.org, key.user, key.name] for key in found]
    print_columns(Console(), ("ID", "CREATED", "FOR", "ORGANISATION", "USER", "NAME"), rows)


def _scope(key: Key) -> str:
    return f"work on {', '.join(key.queues) or 'all queues'}" if key.worker else "tasks"


@keys_cli.command()
def revoke(
    key: Annotated[str, Argument(metavar="ID", help="As `taskcast keys list` shows it.")],
    data: Data = None,
    redis: RedisUrl = None,
) -> None:
    """Make a key worthless. Running servers know it for ten seconds more."""

    async def main(store: Store) -> None:
        await Identities(store, store.settings).revoke(key)

    _on_store(main, existing(data=data, redis_url=redis))
    sys.stdout.write(f"{key} is revoked.\n")


store_cli.add_typer(keys_cli, name="keys", rich_help_panel="Store")


# agents

AGENTS_PAGE = 1000

AgentId = Annotated[str, Argument(metavar="ID", help="As tasks name it; `default` for tasks that name none.")]
Org = Annotated[str, Option(help="Organisation: whose agent it is.")]


@agents_cli.command("list")
def list_agents(org: Org = DEVELOPMENT_ORG, data: Data = None, redis: RedisUrl = None) -> None:
    """List an organisation's agents, oldest first. A task for an agent makes one, too."""

    async def main(store: Store) -> list[Agent]:
        found: list[Agent] = []
        while page := (await store.agents.list(org, offset=len(found), limit=AGENTS_PAGE))[0]:
            found += page
        return found

    found = _on_store(main, existing(data=data, redis_url=redis))
    if not found:
        sys.stdout.write("There are no agents. `taskcast agents set` makes one, and so does a task for one.\n")
        return
    heads = ("ID", "CREATED", "VERSION", "PROVIDER", "MODEL", "EFFORT", "QUEUE", "NAME")
    rows = [
        [one.id, _local(one.created_at), str(one.version), one.provider, one.model, one.effort, one.queue, one.name]
        for one in found
    ]
    print_columns(Console(), heads, [[cell or "-" for cell in row] for row in rows])


@agents_cli.command("set")
def set_agent(
    agent: AgentId,
    name: Annotated[str | None, Option(help="For people.")] = None,
    provider: Annotated[str | None, Option(help="Of the model, such as openai.")] = None,
    model: Annotated[str | None, Option(help="What its tasks are done with.")] = None,
    effort: Annotated[str | None, Option(help=f"Of the model: {', '.join(EFFORTS[1:])}.")] = None,
    queue: Annotated[str | None, Option(help="Where its tasks wait; agent:ID when it names none.")] = None,
    org: Org = DEVELOPMENT_ORG,
    data: Data = None,
    redis: RedisUrl = None,
) -> None:
    """Change an agent, or make it. What is not given stays; an empty text takes back what was said."""

    async def main(store: Store) -> Agent:
        return await store.agents.save(
            org, agent, name=name, provider=provider, model=model, effort=effort, queue=queue
        )

    settings = settings_of(data=data, redis_url=redis)
    _say_if_new(settings)
    saved = _on_store(main, settings)
    sys.stdout.write(f"{saved.id} has version {saved.version}. It counts for tasks that are submitted from now on.\n")


@agents_cli.command("delete")
def delete_agent(agent: AgentId, org: Org = DEVELOPMENT_ORG, data: Data = None, redis: RedisUrl = None) -> None:
    """Forget what was said of an agent. Its tasks stay."""

    async def main(store: Store) -> None:
        await store.agents.delete(org, agent)

    _on_store(main, existing(data=data, redis_url=redis))
    sys.stdout.write(f"{agent} is forgotten; its tasks stay.\n")


store_cli.add_typer(agents_cli, name="agents", rich_help_panel="Store")


# verify, rebuild


@store_cli.command(rich_help_panel="Store")
def verify(data: Data = None, redis: RedisUrl = None) -> None:
    """Prove every snapshot, list and queue against the log. Exit code 1 when any differs."""
    settings = existing(data=data, redis_url=redis)
    busy = bool(settings.redis_url) or in_use(settings.data)

    async def main(store: Store) -> tuple[int, list[Difference]]:
        tasks = await store.snapshots.count()
        found = [difference async for difference in store.snapshots.verify()]
        if found and busy:
            # What was being written while it was read looks like a difference; a real one is there twice.
            again = {difference async for difference in store.snapshots.verify()}
            found = [difference for difference in found if difference in again]
        return tasks, found

    tasks, found = _on_store(main, settings)
    for difference in found:
        sys.stdout.write(f"{difference.task}: {difference.what}\n")
    counted = f"{tasks:,} task{'' if tasks == 1 else 's'} checked"
    if not found:
        sys.stdout.write(f"{counted}: everything agrees with the log.\n")
        return
    counted += f": {len(found):,} difference{'' if len(found) == 1 else 's'}"
    sys.stdout.write(f"{counted}. Stop all servers and workers, then `taskcast rebuild` mends them from the log.\n")
    raise typer.Exit(1)


@store_cli.command(rich_help_panel="Store")
def rebuild(
    data: Data = None,
    redis: RedisUrl = None,
    yes: Annotated[bool, Option("--yes", help="Nobody uses the store: with --redis this cannot be seen.")] = False,
) -> None:
    """Write all snapshots, lists and queues again, from the log alone. Nobody else may use the store meanwhile."""
    settings = existing(data=data, redis_url=redis)
    if not settings.redis_url and in_use(settings.data):
        raise Misconfigured(f"A server or a worker uses {settings.data}. Stop it first: rebuild needs the store alone.")
    if settings.redis_url and not yes:
        raise Misconfigured("Stop every server and worker of this store, then say so with --yes.")

    async def main(store: Store) -> tuple[int, list[str]]:
        return await store.snapshots.rebuild()

    count, damaged = _on_store(main, settings)
    for id_ in damaged:
        sys.stderr.write(f"The events of task {id_} are damaged; its keys were left as they are.\n")
    sys.stdout.write(
        f"{count:,} task{'' if count == 1 else 's'} rebuilt from the log; running ones are queued again.\n"
    )
    if damaged:
        raise typer.Exit(1)


def _local(micros: int) -> str:
    return f"{datetime.fromtimestamp(micros / 1_000_000, UTC).astimezone():%Y-%m-%d %H:%M}"


def _on_store(main: Callable[[Store], Coroutine[Any, Any, T]], settings: Settings) -> T:
    """What `main` makes of the open store."""
    configure_logs("warning")  # for a person: only what goes wrong

    async def opened() -> T:
        async with open_store(settings) as store:
            return await main(store)

    return run(opened())


def existing(**options: Any) -> Settings:
    """Of a store that is there: opening one would make it. Raises Misconfigured."""
    settings = settings_of(**options)
    if not settings.redis_url and not (settings.data / "users").exists():
        raise Misconfigured(f"{settings.data} is no data folder; --data names one.")
    return settings


def in_use(folder: Path) -> bool:
    """Whether a server or a worker has the embedded store open: each of them shares a lock on `users`."""
    with (folder / "users").open("rb") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
