"""compose.yaml: what it names exists. Docker is not needed; nothing is pulled."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
import yaml

from app import local, remote
from app.identity import loopback
from app.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def dockerfile(service: dict[str, Any]) -> list[tuple[str, str]]:
    """(instruction, its arguments)."""
    text = service["build"]["dockerfile_inline"].replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_it_is_valid_by_the_compose_specifications_own_schema() -> None:
    """As check-jsonschema ships it; the command, for its Python side is no public interface."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    for file, code in ((ROOT / "compose.yaml", 0), (ROOT / "pyproject.toml", 1)):
        found = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
        assert found.returncode == code, found.stdout


def test_the_store_is_one_service_and_api_and_worker_are_others() -> None:
    assert set(SERVICES) == {"valkey", "api", "worker"}
    assert set(OURS) == {"api", "worker"}
    assert set(COMPOSE) <= {"name", "services", "volumes", "x-taskcast"}


def test_the_store_is_durable_and_evicts_nothing() -> None:
    words = SERVICES["valkey"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "valkey-server"
    assert options == {
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
    }
    (volume,) = SERVICES["valkey"]["volumes"]
    name, _, target = volume.partition(":")
    assert name in COMPOSE["volumes"]
    assert target == "/data"
    assert "ports" not in SERVICES["valkey"]


def test_the_image_is_made_of_files_that_exist() -> None:
    for service in OURS.values():
        steps = dockerfile(service)
        assert steps[0][0] == "FROM"
        assert {step for step, _ in steps} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT"}
        for step, arguments in steps:
            if step == "COPY":
                *sources, _ = shlex.split(arguments)
                for source in sources:
                    assert (ROOT / source).exists(), source
        assert ("ENTRYPOINT", '["python", "-P", "-m", "app.cli"]') in steps
        assert "--require-hashes" in dict(steps)["RUN"]
        assert dict(steps)["USER"] != "root"


def test_each_command_is_one_of_the_command_line() -> None:
    whole = typer.Typer()
    whole.add_typer(local.cli)
    whole.add_typer(remote.cli)
    commands: dict[str, Any] = typer.main.get_command(whole).commands  # type: ignore[attr-defined]
    for service in OURS.values():
        verb, *words = service["command"]
        assert verb in commands
        options = {name for parameter in commands[verb].params for name in parameter.opts}
        for word in words:
            assert not word.startswith("-") or word in options, word
    (module,) = SERVICES["worker"]["command"][1:]
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def test_each_variable_is_a_setting_with_a_good_value() -> None:
    for service in OURS.values():
        named = {name.removeprefix("TASKCAST_").lower(): value for name, value in service["environment"].items()}
        assert all(name.startswith("TASKCAST_") for name in service["environment"])
        settings = Settings(**named)
        assert settings.redis_url == "redis://valkey:6379/0"
        assert not loopback(settings.host)  # so that the development key is refused
        assert re.fullmatch(r"\d+s", service["stop_grace_period"])
        assert int(service["stop_grace_period"][:-1]) > 2 * settings.grace_seconds


def test_only_this_machine_reaches_the_api_and_health_is_asked_where_it_answers() -> None:
    (port,) = SERVICES["api"]["ports"]
    assert port == f"127.0.0.1:{Settings().port}:{Settings().port}"
    (*_, probe) = SERVICES["api"]["healthcheck"]["test"]
    compile(probe, "healthcheck", "exec")
    assert f"127.0.0.1:{Settings().port}/readiness" in probe
    for service in OURS.values():
        assert service["depends_on"] == {"valkey": {"condition": "service_healthy"}}
