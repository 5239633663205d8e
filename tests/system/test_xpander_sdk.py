"""The real client: `xpander-sdk[agno]` 2.0.537, unmodified, against the real server (contract §3, §5).

Its packages clash with ours, so it lives in an environment of its own (scripts/test makes it), and what it does, it does
in processes of its own: `xpander_client.py` calls it for us, `xpander_worker.py` is a worker as its users write them.
"""

import asyncio
import json
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import KEY, ROOT, Api, Process, client_of, lifetime
from tests.waiting import wait_until

SDK = ROOT / ".venv-xpander"
VERSION = "2.0.537"
PYTHON = SDK / "bin" / "python"
ORG = "00000000-0000-0000-0000-000000000001"
PREFIX = "/agent-controller"
"""Of a base address to whose paths the SDK adds the organisation, all of them (contract §3.1)."""
LEASE_SECONDS = 5.0
"""Its workers send a heartbeat every two seconds."""
SLOTS = 6
"""Tasks that its workers work on at a time."""
START_SECONDS_MAX = 40
"""Its packages are many: it takes seconds to start, and on a loaded machine a lot of them."""
TERMINAL = {"completed", "failed", "error", "stopped"}
Json = dict[str, Any]

pytestmark = pytest.mark.skipif(
    not (SDK / ".requirements-xpander.lock").exists(),
    reason="xpander-sdk is not installed in .venv-xpander (scripts/test does it)",
)


class Refused(Exception):
    """What the SDK raised."""

    def __init__(self, said: Json) -> None:
        super().__init__(said["text"])
        self.name, self.status_code, self.description = said["raised"], said["status_code"], said["description"]

    @property
    def detail(self) -> Any:
        return json.loads(self.description)["detail"]


def environment(url: str, agent: str = "") -> dict[str, str]:
    return {
        "XPANDER_BASE_URL": url,
        "XPANDER_API_KEY": KEY,
        "XPANDER_ORGANIZATION_ID": ORG,
        "XPANDER_AGENT_ID": agent,
        "XPANDER_STREAMING_PORT": "0",  # a free one, for each worker
        "GIT_TOKEN": "",  # it would write one into the user's own ~/.git-credentials
        "PYTHONDONTWRITEBYTECODE": "",  # compiled, the SDK is there in 3 s instead of 7
    }


class Client(Process):
    """`xpander_client.py`."""

    def __init__(self, name: str, folder: Path, url: str) -> None:
        super().__init__(name, [str(PYTHON), "tests/system/xpander_client.py"], folder, **environment(url))

    def start(self) -> None:
        with self.log.open("a") as log:
            self.running = self._spawn(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def stop(self) -> None:
        """It ends with its input."""
        assert self.running
        with self.running as running:
            assert running.stdin
            running.stdin.close()
            assert running.wait() == 0

    async def __call__(self, call: str, task: str | None = None, **more: Any) -> Any:
        """What a method of `Tasks` says, or one of the task with this id. Arguments, or `fields` and `configuration`.

        Raises Refused.
        """
        asked: Json = {"call": call, **({"task": task} if task else {})}
        asked |= {name: more.pop(name) for name in ("fields", "configuration") if name in more}
        said = json.loads(await asyncio.to_thread(self._exchange, json.dumps({**asked, "named": more})))
        if "raised" in said:
            raise Refused(said)
        return said["said"]

    def _exchange(self, line: str) -> str:
        assert self.running
        assert self.running.stdin
        assert self.running.stdout
        self.running.stdin.write(f"{line}\n")
        self.running.stdin.flush()
        return self.running.stdout.readline()


class Worker(Process):
    """`xpander_worker.py`, which holds some tasks until the test lets them end."""

    def __init__(self, name: str, folder: Path, url: str, agent: str, *options: str) -> None:
        self.folder = folder
        program = [str(PYTHON), "tests/system/xpander_worker.py", str(folder), *options]
        super().__init__(name, program, folder, **environment(url, agent))

    def let_end(self, id_: str) -> None:
        (self.folder / id_).touch()

    def began(self, id_: str) -> int:
        """How often."""
        return self.log.read_text().count(f"works on {id_}")

    def has_finished(self, id_: str) -> bool:
        """Its last word on the task was sent, whatever became of it."""
        return f"Finished handling task {id_}" in self.log.read_text()

    def end(self) -> None:
        """If the test has not."""
        if self.running and self.running.returncode is None:
            self.kill()

    def result(self, text: str) -> str:
        assert self.running
        return f"{text}, said process {self.running.pid}"


@pytest.fixture(scope="module")
def own_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Without workers of our own."""
    folder = tmp_path_factory.mktemp("xpander")
    yield from lifetime(Api("xpander-api", folder, TASKCAST_LEASE_SECONDS=str(LEASE_SECONDS)))


@pytest.fixture(scope="module", params=["", PREFIX], ids=["plain", "prefixed"])
def client(request: pytest.FixtureRequest, own_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """With each form of the base address."""
    yield from lifetime(Client("xpander-client", tmp_path_factory.mktemp("client"), own_api.url + request.param))


@pytest.fixture
async def http(own_api: Api) -> AsyncIterator[httpx.AsyncClient]:
    """The same server by the documented REST API, and by Shannon's."""
    async with client_of(own_api.url) as made:
        yield made


@pytest.fixture
def agent() -> str:
    """One that nobody else serves."""
    return f"agent-{uuid.uuid4()}"


@pytest.fixture(scope="module")
def worker(own_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One that stays, on the first form of the base address: it takes its time to start."""
    folder = tmp_path_factory.mktemp("worker")
    yield from lifetime(Worker("xpander-worker", folder, own_api.url, f"agent-{uuid.uuid4()}"))


@pytest.fixture
async def employer(worker: Worker, http: httpx.AsyncClient) -> AsyncIterator[str]:
    """The agent whose tasks it takes. What a test that failed leaves it, does not keep it from the next test's."""
    agent = worker.environment["XPANDER_AGENT_ID"]
    yield agent
    for status in ("pending", "executing"):
        left = await http.get(f"/v1/agents/{agent}/tasks", params={"status": status, "per_page": 50})
        for task in left.json()["items"]:
            await http.post(f"/v1/tasks/{task['id']}/stop")
            worker.let_end(task["id"])


@pytest.fixture
def hire(own_api: Api, agent: str, tmp_path: Path) -> Iterator[Callable[[str], Worker]]:
    """Starts workers of the agent, on the other form; they are ended with the test, or by it."""
    with ExitStack() as stack:

        def start(name: str) -> Worker:
            made = Worker(f"xpander-{name}", tmp_path, own_api.url + PREFIX, agent)
            made.start()
            stack.callback(made.end)
            return made

        yield start


async def invoke(http: httpx.AsyncClient, agent: str, text: str = "Hello", **body: Any) -> str:
    """By REST. The task's id."""
    response = await http.post(f"/v1/agents/{agent}/invoke/async", json={"input": {"text": text}, **body})
    assert response.status_code == 200, response.text
    id_: str = response.json()["id"]
    return id_


async def get(http: httpx.AsyncClient, id_: str) -> Json:
    response = await http.get(f"/v1/tasks/{id_}")
    assert response.status_code == 200, response.text
    task: Json = response.json()
    return task


async def becomes(http: httpx.AsyncClient, id_: str, *wanted: str) -> Json:
    """The task, as soon as it has one of these statuses."""
    task: Json = {}

    async def has() -> bool:
        nonlocal task
        task = await get(http, id_)
        return task["status"] in wanted

    await wait_until(has, f"{id_} is {' or '.join(wanted)}", seconds_max=START_SECONDS_MAX)
    return task


async def begins(worker: Worker, id_: str) -> None:
    await wait_until(lambda: worker.began(id_) > 0, f"{id_} is worked on", seconds_max=START_SECONDS_MAX)


def test_the_sdk_is_the_one_that_the_contract_describes() -> None:
    assert [*SDK.glob(f"lib/python*/site-packages/xpander_sdk-{VERSION}.dist-info")]


# Tasks: create, get, list, update, stop


async def test_a_task_is_created_and_read(client: Client, http: httpx.AsyncClient, agent: str) -> None:
    asked: Json = {
        "output_format": "json",
        "output_schema": {"type": "object"},
        "events_streaming": True,
        "additional_context": "in haste",
        "expected_output": "a greeting",
        "instructions_override": "be kind",
        "triggering_agent_id": "another",
        "llm_model_provider": "openai",
        "llm_model_name": "gpt-5",
        "llm_reasoning_effort": "low",
        "title": "A greeting",
    }
    user = {"id": "u1", "email": "u1@example.com", "first_name": "Ü"}
    files = ["https://example.com/a.csv"]
    created = await client("Tasks.acreate", agent_id=agent, prompt="Hello", file_urls=files, user_details=user, **asked)
    assert (created["status"], created["agent_id"], created["organization_id"]) == ("pending", agent, ORG)
    assert {name: created[name] for name in asked} == asked
    assert (created["input"]["text"], created["input"]["files"]) == ("Hello", files)
    assert {name: created["input"]["user"][name] for name in user} == user
    assert created["source"] == "sdk"
    assert (created["result"], created["finished_at"], created["is_manually_stopped"]) == (None, None, False)
    age = datetime.now(UTC) - datetime.fromisoformat(created["created_at"])
    assert abs(age.total_seconds()) < 60
    assert await client("Tasks.aget", task_id=created["id"]) == created
    assert await client("Task.areload", task=created["id"]) == created
    shown = await get(http, created["id"])
    assert {name: shown[name] for name in asked} == asked


async def test_tasks_are_listed_newest_first_and_filtered(client: Client, agent: str) -> None:
    user = {"id": f"user-{uuid.uuid4()}", "email": "u@example.com"}
    first = await client("Tasks.acreate", agent_id=agent, prompt="First", user_details=user)
    second = await client("Tasks.acreate", agent_id=agent, prompt="Second", title="Two", triggering_agent_id="another")
    await client("Task.asave", task=first["id"], fields={"internal_status": "half way"})
    await client("Tasks.aupdate", task_id=second["id"], status="completed", result="Done.")

    listed = await client("Tasks.alist", agent_id=agent)
    assert [task["id"] for task in listed] == [second["id"], first["id"]]
    assert [task["status"] for task in listed] == ["completed", "pending"]
    assert [task["result"] for task in listed] == ["Done.", None]
    assert [task["title"] for task in listed] == ["Two", "First"]
    assert [task["user_id"] for task in listed] == [None, user["id"]]
    assert {(task["agent_id"], task["organization_id"]) for task in listed} == {(agent, ORG)}
    for filters, expected in (
        ({"status": "completed"}, [second]),
        ({"status": "pending"}, [first]),
        ({"status": "stopped"}, []),
        ({"user_id": user["id"]}, [first]),
        ({"internal_status": "half way"}, [first]),
        ({"triggering_agent_id": "another"}, [second]),
        ({"parent_task_id": "none"}, []),
    ):
        found = await client("Tasks.alist", agent_id=agent, filters=filters)
        assert [task["id"] for task in found] == [task["id"] for task in expected], filters

    of_user = await client("Tasks.alist_user_tasks", user_id=user["id"])
    assert [task["id"] for task in of_user] == [first["id"]]
    assert await client("Tasks.alist_user_tasks", user_id=user["id"], filters={"status": "completed"}) == []
    assert await client("Tasks.alist", agent_id=f"{agent}-unknown") == []


async def test_a_task_is_updated(client: Client, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    task = await client("Tasks.aupdate", task_id=id_, status="executing", last_executed_node_id="node-1", source="api")
    assert (task["status"], task["last_executed_node_id"], task["source"]) == ("executing", "node-1", "api")
    assert task["started_at"]
    task = await client("Tasks.aupdate", task_id=id_, tool_call_payload_extension={"headers": {"x": "y"}})
    assert (task["status"], task["last_executed_node_id"]) == ("executing", "node-1")
    task = await client("Tasks.aupdate", task_id=id_, status="failed", result="It could not be done.")
    assert (task["status"], task["result"]) == ("failed", "It could not be done.")
    assert task["finished_at"]
    assert await client("Tasks.aget", task_id=id_) == task


@pytest.mark.parametrize("ending", sorted(TERMINAL - {"stopped"}))
async def test_a_status_is_set_with_a_result_and_without_one(client: Client, agent: str, ending: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    task = await client("Task.aset_status", task=id_, status="executing", result="So far.")
    assert (task["status"], task["result"], task["finished_at"]) == ("executing", "So far.", None)
    task = await client("Task.aset_status", task=id_, status="paused")  # it sends `result: null`
    assert (task["status"], task["result"]) == ("paused", None)
    assert task["paused_at"]
    task = await client("Task.aset_status", task=id_, status="executing", result="Further.")
    assert (task["status"], task["result"], task["finished_at"]) == ("executing", "Further.", None)
    task = await client("Task.aset_status", task=id_, status=ending, result="Done.")
    assert (task["status"], task["result"]) == (ending, "Done.")
    assert task["finished_at"]
    assert await client("Tasks.aget", task_id=id_) == task


async def test_a_saved_task_keeps_what_is_its_own_and_takes_what_is_the_callers(client: Client, agent: str) -> None:
    created = await client("Tasks.acreate", agent_id=agent, prompt="Hello", events_streaming=True)
    theirs = {"internal_status": "half way", "title": "Named", "additional_context": "more", "used_tools": ["search"]}
    foreign = {"agent_id": "other", "organization_id": "other", "created_at": "2020-01-01T00:00:00Z"}
    saved = await client("Task.asave", task=created["id"], fields={**theirs, **foreign})
    assert {name: saved[name] for name in theirs} == theirs
    assert {name: saved[name] for name in foreign} == {name: created[name] for name in foreign}
    assert (saved["status"], saved["input"], saved["events_streaming"]) == ("pending", created["input"], True)
    assert await client("Tasks.aget", task_id=created["id"]) == saved

    plan = {
        "enabled": True,
        "enforce": True,
        "started": True,
        "question_raised": False,
        "tasks": [{"id": "1", "title": "Think", "completed": False}],
    }
    saved = await client("Task.asave", task=created["id"], fields={"deep_planning": plan}, with_deep_plan_update=True)
    assert saved["deep_planning"] == plan
    await client("Task.asave", task=created["id"])  # says nothing of the plan
    assert (await client("Tasks.aget", task_id=created["id"]))["deep_planning"] == plan
    status = await client("Task.aget_plan_following_status", task=created["id"])
    assert (status["can_finish"], [one["id"] for one in status["uncompleted_tasks"]]) == (False, ["1"])


async def test_a_task_is_stopped_paused_and_stopped_again(client: Client, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    task = await client("Tasks.astop", task_id=id_)
    assert (task["status"], task["is_manually_stopped"]) == ("stopped", True)
    assert task["finished_at"]
    assert await client("Task.astop", task=id_) == task  # once is enough
    late = await client("Task.aset_status", task=id_, status="completed", result="Too late.")
    assert (late["status"], late["result"]) == ("stopped", None)
    late = await client("Task.aset_status", task=id_, status="stopped", result="Too late.")
    assert (late["status"], late["result"]) == ("stopped", None)
    task = await client("Task.aset_status", task=id_, status="paused")
    assert (task["status"], task["finished_at"]) == ("paused", None)
    assert (await client("Task.astop", task=id_))["status"] == "stopped"
    assert (await client("Tasks.aget", task_id=id_))["status"] == "stopped"


async def test_a_tasks_id_begins_another_turn(client: Client, agent: str) -> None:
    id_ = f"conversation-{uuid.uuid4()}"
    first = await client("Tasks.acreate", agent_id=agent, existing_task_id=id_, prompt="First")
    assert (first["id"], first["status"]) == (id_, "pending")
    await client("Task.aset_status", task=id_, status="completed", result="One.")
    second = await client("Tasks.acreate", agent_id=agent, existing_task_id=id_, prompt="Second")
    assert (second["id"], second["status"], second["result"], second["finished_at"]) == (id_, "pending", None, None)
    assert (second["input"]["text"], second["created_at"]) == ("Second", first["created_at"])
    await client("Task.aset_status", task=id_, status="completed", result="Two.")
    (listed,) = await client("Tasks.alist", agent_id=agent)
    assert (listed["title"], listed["result"]) == ("Second", "Two.")
    log = await client("Task.aget_activity_log", task=id_)
    assert [(said["role"], said["content"]["text"]) for said in log["messages"]] == [
        ("user", "First"),
        ("agent", "One."),
        ("user", "Second"),
        ("agent", "Two."),
    ]


async def test_the_blocking_calls_do_the_same(client: Client, agent: str) -> None:
    created = await client("Tasks.create", agent_id=agent, prompt="Hello", events_streaming=True)
    id_ = created["id"]
    assert await client("Tasks.get", task_id=id_) == created
    assert (await client("Tasks.update", task_id=id_, status="executing"))["status"] == "executing"
    assert (await client("Task.save", task=id_, fields={"title": "Named"}))["title"] == "Named"
    assert (await client("Task.set_status", task=id_, status="completed", result="Done."))["result"] == "Done."
    assert [task["id"] for task in await client("Tasks.list", agent_id=agent)] == [id_]
    assert [event["type"] for event in await client("Task.events", task=id_)][-1] == "task_finished"
    stopped = await client("Tasks.create", agent_id=agent, prompt="Hello")
    assert (await client("Tasks.stop", task_id=stopped["id"]))["status"] == "stopped"


# What else a task says and is told


async def test_a_finished_tasks_events_are_told_from_the_beginning(client: Client, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello", events_streaming=True))["id"]
    await client("Task.aset_status", task=id_, status="executing")
    await client("Task.aset_status", task=id_, status="completed", result="Done.")
    told = await client("Task.aevents", task=id_)
    assert [event["type"] for event in told] == ["task_created", "task_updated", "task_finished"]
    assert [event["data"]["status"] for event in told] == ["pending", "executing", "completed"]
    assert {(event["task_id"], event["organization_id"]) for event in told} == {(id_, ORG)}
    assert told[-1]["data"] == await client("Tasks.aget", task_id=id_)


async def test_events_are_told_of_tasks_that_want_them_and_exist(client: Client, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    with pytest.raises(Refused) as raised:
        await client("Task.aevents", task=id_)
    assert raised.value.name == "ValueError"


async def test_a_task_that_was_done_elsewhere_is_reported(client: Client, agent: str) -> None:
    report: Json = {"agent_id": agent, "tokens": {"prompt_tokens": 3, "completion_tokens": 4}, "used_tools": ["search"]}
    done = await client(
        "Task.areport_external_task",
        **report,
        id=f"external-{uuid.uuid4()}",
        input="Hello",
        result="Done.",
        llm_response={"raw": 1},
        duration=1.5,
    )
    assert (done["status"], done["result"], done["input"]["text"]) == ("completed", "Done.", "Hello")
    assert (done["agent_id"], done["duration"], done["used_tools"]) == (agent, 1.5, ["search"])
    assert (done["tokens"]["prompt_tokens"], done["tokens"]["total_tokens"]) == (3, 7)
    assert await client("Tasks.aget", task_id=done["id"]) == done
    again = await client("Task.areport_external_task", **report, id=done["id"], input="Hello", result="Done better.")
    assert (again["id"], again["result"], again["created_at"]) == (done["id"], "Done better.", done["created_at"])
    failed = await client("Task.areport_external_task", **report, input="Hello", is_success=False, result=None)
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert failed["id"] not in {done["id"], None}
    assert [task["id"] for task in await client("Tasks.alist", agent_id=agent)] == [failed["id"], done["id"]]


async def test_tokens_are_saved_with_the_end_and_count_once_however_often_they_are_told(
    client: Client, agent: str
) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    end = {"status": "completed", "result": "Done.", "tokens": {"prompt_tokens": None, "completion_tokens": 4}}
    saved = await client("Task.asave", task=id_, fields=end)
    assert (saved["tokens"]["prompt_tokens"], saved["tokens"]["completion_tokens"]) == (0, 4)
    await client("Task.asave", task=id_)
    for _ in range(2):
        await client("Task.areport_metrics", task=id_)
    assert (await client("Tasks.aget", task_id=id_))["tokens"] == saved["tokens"]


async def test_tokens_that_are_only_reported_count(client: Client, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    await client("Task.aset_status", task=id_, status="completed", result="Done.")
    tokens = {"prompt_tokens": 3, "completion_tokens": 4}
    await client("Task.areport_metrics", task=id_, fields={"tokens": tokens})
    task = await client("Tasks.aget", task_id=id_)
    assert {name: task["tokens"][name] for name in tokens} == tokens
    assert (task["status"], task["result"]) == ("completed", "Done.")


async def test_what_was_said_is_in_the_activity_log(client: Client, agent: str) -> None:
    user = {"id": "u1", "email": "u1@example.com"}
    created = await client("Tasks.acreate", agent_id=agent, prompt="Hello", user_details=user)
    log = await client("Task.aget_activity_log", task=created["id"])
    assert [(said["role"], said["content"]["text"]) for said in log["messages"]] == [("user", "Hello")]
    await client("Task.aset_status", task=created["id"], status="completed", result="Done.")
    log = await client("Task.aget_activity_log", task=created["id"])
    assert (log["id"], log["created_at"]) == (created["id"], created["created_at"])
    assert [(said["role"], said["content"]["text"]) for said in log["messages"]] == [
        ("user", "Hello"),
        ("agent", "Done."),
    ]


# Errors


async def test_an_unknown_task_is_not_found(client: Client) -> None:
    unknown = str(uuid.uuid4())
    for call, named in (
        ("Tasks.aget", {}),
        ("Tasks.aupdate", {"status": "completed"}),
        ("Tasks.astop", {}),
    ):
        with pytest.raises(Refused) as raised:
            await client(call, task_id=unknown, **named)
        assert (raised.value.name, raised.value.status_code) == ("ModuleException", 404), call
        assert raised.value.detail == "Task not found"


async def test_a_deleted_task_is_not_found(client: Client, http: httpx.AsyncClient, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="Hello"))["id"]
    assert (await http.delete(f"/v1/tasks/{id_}")).status_code == 204
    with pytest.raises(Refused) as raised:
        await client("Tasks.aget", task_id=id_)
    assert raised.value.status_code == 404
    assert await client("Tasks.alist", agent_id=agent) == []


async def test_a_task_at_work_takes_no_other_turn_and_none_of_another_agent(client: Client, agent: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=agent, prompt="First"))["id"]
    await client("Task.aset_status", task=id_, status="executing")
    with pytest.raises(Refused) as raised:
        await client("Tasks.acreate", agent_id=agent, existing_task_id=id_, prompt="Second")
    assert (raised.value.name, raised.value.status_code) == ("ModuleException", 409)
    assert isinstance(raised.value.detail, str)
    await client("Task.aset_status", task=id_, status="completed", result="Done.")
    with pytest.raises(Refused) as raised:
        await client("Tasks.acreate", agent_id=f"{agent}-other", existing_task_id=id_, prompt="Second")
    assert raised.value.status_code in {403, 404}
    assert (await client("Tasks.aget", task_id=id_))["input"]["text"] == "First"


async def test_a_wrong_key_is_refused(client: Client, agent: str) -> None:
    for call, named in (
        ("Tasks.acreate", {"agent_id": agent, "prompt": "Hello"}),
        ("Tasks.alist", {"agent_id": agent}),
        ("Tasks.aget", {"task_id": "x"}),
        ("Tasks.astop", {"task_id": "x"}),
        ("Task.areport_external_task", {"agent_id": agent}),
    ):
        with pytest.raises(Refused) as raised:
            await client(call, configuration={"api_key": "sk_wrong"}, **named)
        assert (raised.value.name, raised.value.status_code) == ("ModuleException", 401), call
        assert isinstance(raised.value.detail, str)


async def test_what_cannot_be_meant_is_a_validation_error(client: Client, agent: str) -> None:
    for call, named in (
        ("Tasks.alist", {"agent_id": agent, "filters": {"status": "dreaming"}}),
        ("Tasks.acreate", {"agent_id": agent, "existing_task_id": "no task!"}),
    ):
        with pytest.raises(Refused) as raised:
            await client(call, **named)
        assert (raised.value.name, raised.value.status_code) == ("ModuleException", 422), call
        assert raised.value.detail[0].keys() >= {"loc", "msg", "type"}


# Workers


async def test_a_worker_finishes_what_rest_asks_for(http: httpx.AsyncClient, worker: Worker, employer: str) -> None:
    id_ = await invoke(http, employer, "Hold it")
    task = await becomes(http, id_, "executing")
    assert (task["result"], task["finished_at"]) == (None, None)
    worker.let_end(id_)
    task = await becomes(http, id_, *TERMINAL)
    assert (task["status"], task["result"]) == ("completed", worker.result("Hold it"))
    assert task["created_at"] <= task["started_at"] <= task["finished_at"]
    assert {"prompt_tokens": 3, "completion_tokens": 4}.items() <= task["tokens"].items()


async def test_a_workers_task_is_told_as_it_happens(client: Client, worker: Worker, employer: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=employer, prompt="Hold it", events_streaming=True))["id"]
    watching = asyncio.create_task(client("Task.aevents", task=id_))
    await begins(worker, id_)
    worker.let_end(id_)
    told = await watching
    assert [event["type"] for event in told if event["type"] != "task_updated"] == ["task_created", "task_finished"]
    assert (told[0]["data"]["status"], told[-1]["data"]["status"]) == ("pending", "completed")
    assert "executing" in {event["data"]["status"] for event in told}
    assert told[-1]["data"]["result"] == worker.result("Hold it")


async def test_a_workers_tools_are_told_and_logged(client: Client, worker: Worker, employer: str) -> None:
    id_ = (await client("Tasks.acreate", agent_id=employer, prompt="Search", events_streaming=True))["id"]
    told = [event for event in await client("Task.aevents", task=id_) if event["type"].startswith("tool_call")]
    call = {"request_id": "call-1", "operation_id": "search", "tool_name": "Search", "payload": {"query": "logs"}}
    assert [event["type"] for event in told] == ["tool_call_request", "tool_call_result"]
    assert [{name: event["data"][name] for name in call} for event in told] == [call, call]
    assert (told[1]["data"]["result"], told[1]["data"]["is_error"]) == ({"found": 3}, False)
    said = (await client("Task.aget_activity_log", task=id_))["messages"]
    assert [one["content"]["text"] for one in (said[0], said[-1])] == ["Search", worker.result("Search")]
    logged = [(one["tool_name"], one["payload"], one["result"]) for one in said[1:-1]]
    assert logged[-1] == ("Search", {"query": "logs"}, {"found": 3})


async def test_a_handler_that_raises_is_an_error(http: httpx.AsyncClient, employer: str) -> None:
    task = await becomes(http, await invoke(http, employer, "Fail"), *TERMINAL)
    assert (task["status"], task["result"]) == ("error", "no luck")
    assert task["finished_at"]


async def test_an_answer_that_promises_is_tried_twice_and_finished_once(
    client: Client, worker: Worker, employer: str
) -> None:
    """The SDK does so by itself, and sends its last words twice then."""
    promise = "I will see to it"
    id_ = (await client("Tasks.acreate", agent_id=employer, prompt=promise, events_streaming=True))["id"]
    told = await client("Task.aevents", task=id_)
    assert worker.began(id_) == 2
    assert [event["type"] for event in told].count("task_finished") == 1
    await wait_until(lambda: worker.log.read_text().count(f"Finished handling task {id_}") == 2, "its last word")
    task = await client("Tasks.aget", task_id=id_)
    assert (task["status"], task["result"]) == ("completed", worker.result(promise))
    assert task["finished_at"] == told[-1]["data"]["finished_at"]
    assert (task["tokens"]["prompt_tokens"], task["tokens"]["completion_tokens"]) == (3, 4)


async def test_a_worker_has_six_tasks_at_a_time(http: httpx.AsyncClient, worker: Worker, employer: str) -> None:
    ids = [await invoke(http, employer, f"Hold {number}") for number in range(2 * SLOTS + 1)]

    def begun() -> list[str]:
        return [id_ for id_ in ids if worker.began(id_)]

    await wait_until(lambda: len(begun()) == SLOTS, "the worker is full", seconds_max=START_SECONDS_MAX)
    listed = await http.get(f"/v1/agents/{employer}/tasks", params={"status": "executing", "per_page": 50})
    assert sorted(task["id"] for task in listed.json()["items"]) == sorted(begun())
    for id_ in ids:
        worker.let_end(id_)
    for id_ in ids:
        assert (await becomes(http, id_, *TERMINAL))["status"] == "completed"
    assert [worker.began(id_) for id_ in ids] == [1] * len(ids)


async def test_a_worker_keeps_its_task_as_long_as_its_heart_beats(
    http: httpx.AsyncClient, worker: Worker, employer: str
) -> None:
    id_ = await invoke(http, employer, "Hold it")
    started = datetime.fromisoformat((await becomes(http, id_, "executing"))["started_at"])
    two_leases = timedelta(seconds=2 * LEASE_SECONDS)
    await wait_until(lambda: datetime.now(UTC) - started > two_leases, "two leases are over")
    worker.let_end(id_)
    assert (await becomes(http, id_, *TERMINAL))["status"] == "completed"
    assert worker.began(id_) == 1


@pytest.mark.timeout(120)  # two of them start, one after the other
@pytest.mark.parametrize("end", [Worker.kill, Worker.stop], ids=["killed", "stopped"])
async def test_the_task_of_a_worker_that_ends_goes_to_another_one(
    http: httpx.AsyncClient, agent: str, hire: Callable[[str], Worker], end: Callable[[Worker], None]
) -> None:
    """With SIGTERM it leaves in good order, and its task where it stands."""
    id_ = await invoke(http, agent, "Hold it")
    first = hire("first")
    await begins(first, id_)
    end(first)
    second = hire("second")
    await begins(second, id_)
    second.let_end(id_)
    task = await becomes(http, id_, *TERMINAL)
    assert (task["status"], task["result"]) == ("completed", second.result("Hold it"))


async def test_shannons_task_for_the_agent_is_finished_as_well(
    http: httpx.AsyncClient, worker: Worker, employer: str
) -> None:
    response = await http.post(f"/api/v1/agents/{employer}", json={"input": "Hello from Shannon"})
    assert response.status_code == 202, response.text
    id_ = response.json()["task_id"]
    assert (await becomes(http, id_, *TERMINAL))["status"] == "completed"
    shown = (await http.get(f"/api/v1/tasks/{id_}")).json()
    assert (shown["status"], shown["result"]) == ("TASK_STATUS_COMPLETED", worker.result("Hello from Shannon"))


async def test_a_stopped_tasks_late_result_is_ignored(
    client: Client, http: httpx.AsyncClient, worker: Worker, employer: str
) -> None:
    ids = [await invoke(http, employer, "Hold it") for _ in range(2)]
    for id_ in ids:
        await becomes(http, id_, "executing")
    assert (await http.post(f"/v1/tasks/{ids[0]}/stop")).json()["status"] == "stopped"
    assert (await client("Tasks.astop", task_id=ids[1]))["status"] == "stopped"
    for id_ in ids:
        stopped = await get(http, id_)
        worker.let_end(id_)
        await wait_until(lambda id_=id_: worker.has_finished(id_), "the late result was sent")  # type: ignore[misc]
        task = await get(http, id_)
        assert (task["status"], task["result"], task["is_manually_stopped"]) == ("stopped", None, True)
        assert task["finished_at"] == stopped["finished_at"]
    assert (await becomes(http, await invoke(http, employer, "Next"), *TERMINAL))["status"] == "completed"


async def test_a_prompt_on_the_command_line_is_done_once_and_by_the_worker_itself(
    own_api: Api, http: httpx.AsyncClient, worker: Worker, employer: str, tmp_path: Path
) -> None:
    """The SDK creates the task with its worker's id and `run_locally`, and does not wait for it to be sent."""
    prompted = Worker("xpander-prompted", tmp_path, own_api.url, employer, "--invoke", "--prompt", "Hello")
    prompted.start()
    assert prompted.running
    with prompted.running as running:
        assert await asyncio.to_thread(running.wait) == 0
    newest = (await http.get(f"/v1/agents/{employer}/tasks")).json()["items"][0]
    assert (newest["status"], newest["result"]) == ("completed", prompted.result("Hello"))
    assert (prompted.began(newest["id"]), worker.began(newest["id"])) == (1, 0)


async def test_a_worker_outlives_its_server(
    own_api: Api, http: httpx.AsyncClient, worker: Worker, employer: str
) -> None:
    assert (await becomes(http, await invoke(http, employer, "Before"), *TERMINAL))["status"] == "completed"
    own_api.kill()
    own_api.start()
    task = await becomes(http, await invoke(http, employer, "After"), *TERMINAL)
    assert (task["status"], task["result"]) == ("completed", worker.result("After"))
