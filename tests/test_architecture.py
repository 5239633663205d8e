"""The structure, held: imports point one way, no import hides in a function, and words stay on their side."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"app", "app.errors", "app.events", "app.task", "app.schema"},
    {"app.keys", "app.settings", "app.metrics"},
    {
        "app.embedded",
        "app.line",
        "app.connect",
        "app.log",
        "app.snapshots",
        "app.queues",
        "app.agents",
        "app.registrations",
        "app.seam",
        "app.crowd",
        "app.tail",
        "app.hub",
    },
    {"app.store"},
    {
        "app.identity",
        "app.limits",
        "app.answers",
        "app.requests",
        "app.claims",
        "app.frames",
        "app.streams",
        "app.direct",
        "app.sse",
        "app.api",
        "app.ops",
        "workers",
    },
    {"app.edge", "app.protocol", "app.server", "app.supervisor", "app.screen", "app.remote", "app.local", "app.cli"},
]
"""A module imports from its own layer or a lower one; a package counts with all that is in it."""
HTTP = {"starlette", "sse_starlette", "uvicorn", "httpx", "http", "websockets"}


def modules() -> dict[str, ast.Module]:
    files = [*ROOT.glob("app/**/*.py"), *ROOT.glob("workers/*.py")]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: ast.parse(file.read_text()) for name, file in named.items()}


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(name: str) -> int | None:
    for i, members in enumerate(LAYERS):
        for member in members:
            if name == member or (member != "app" and name.startswith(f"{member}.")):
                return i
    return None


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_has_a_layer_and_imports_no_higher_one(name: str) -> None:
    own = layer(name)
    assert own is not None, f"{name} stands in no layer: give it one in LAYERS, or a better place"
    for other in imports(MODULES[name]):
        theirs = layer(other)
        if other.split(".")[0] in {"app", "workers"} and theirs is not None:
            assert theirs <= own, f"{name} imports {other}, which stands above it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_hides_in_a_function(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden = [inner for inner in ast.walk(node) if isinstance(inner, (ast.Import, ast.ImportFrom))]
            assert not hidden, f"{name}.{node.name} imports at line {hidden[0].lineno}"


def test_the_import_graph_has_no_cycle() -> None:
    graph = {name: {other for other in imports(tree) if other in MODULES} - {name} for name, tree in MODULES.items()}
    while leaves := {name for name, uses in graph.items() if not uses & graph.keys()}:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import one another: {sorted(graph)}"


def test_above_the_store_nobody_says_redis_and_below_it_nobody_says_http() -> None:
    for name, tree in MODULES.items():
        used = {other.split(".")[0] for other in imports(tree)}
        place = layer(name)
        assert place is not None
        if place > 2:
            assert not used & {"redis", "hiredis", "valkey"}, name
            assert (
                not imports(tree) & {"app.line", "app.connect", "app.keys"} or place == 3 or name == "app.identity"
            ), name
        if place < 4:
            assert not used & HTTP, name


def test_the_core_does_no_io() -> None:
    for name in ("app.errors", "app.events", "app.task", "app.schema"):
        used = {other.split(".")[0] for other in imports(MODULES[name])}
        assert not used & {"asyncio", "os", "socket", "pathlib", "redis", "structlog", "time"}, name


def test_dialects_do_not_know_one_another() -> None:
    dialects = {name.split(".")[2] for name in MODULES if name.startswith("app.api.")}
    for name, tree in MODULES.items():
        if name.startswith("app.api."):
            own = name.split(".")[2]
            for other in dialects - {own}:
                assert not any(used.startswith(f"app.api.{other}") for used in imports(tree)), f"{name} knows {other}"
