"""vLLM's engine and its OpenAI-compatible application, from a serving spec."""

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.serving import ServingSpec

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.v1.engine.async_llm import AsyncLLM

    from adaptfleet.on_ray.serve.catalog import Catalog
    from adaptfleet.on_ray.serve.workload import Workload

_OURS = {
    "model",
    "served_model_name",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "enable_lora",
    "max_loras",
    "max_cpu_loras",
    "max_lora_rank",
    "enforce_eager",
    "trust_remote_code",
    "api_key",
    "lora_modules",
    "middleware",
    "scheduling_policy",
}
"""What the spec's own keys or the door decide, so that `engine_args` may not."""


def set_environment(spec: ServingSpec, num_cpus: int, device_type: str) -> None:
    """Before vLLM is imported: it reads these once, and hands them to its processes."""
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The model is a local folder by now; nothing is to be looked up on a hub while serving.
        "HF_HUB_OFFLINE": "1",
        # Adapters come from the registry through the door alone.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if spec.traces_endpoint:
        is_http = spec.traces_endpoint.rstrip("/").endswith("/v1/traces")
        settings["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf" if is_http else "grpc"
    if device_type == "cpu":
        settings |= {
            "VLLM_CPU_KVCACHE_SPACE": str(spec.kv_cache_gib),
            # vLLM's own binding pins every replica of a host to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(num_cpus),
            # vLLM has a process more on a CPU, whose threads it means to bind; unbound ones need none. Without it an engine starts a third
            # sooner, as it imports vLLM twice and not three times, and a step goes through no queue between processes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    os.environ.update(settings)


def argv(spec: ServingSpec, folder: Path, dtype: str) -> list[str]:
    """The spec in vLLM's own flags. ServingError where `engine_args` sets what is not its to set."""
    flags: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": spec.base_id(),
        "dtype": dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "enable_lora": True,
        "max_loras": spec.max_loras,
        "max_cpu_loras": max(spec.max_cpu_loras, spec.max_loras),
        "max_lora_rank": spec.max_lora_rank,
        "enforce_eager": spec.enforce_eager,
        "trust_remote_code": spec.model.trust_remote_code,
        "disable_log_stats": False,
        "disable_fastapi_docs": True,
        # The door numbers requests: by class, and by fair shares within one (fair_order).
        "scheduling_policy": "priority",
    }
    if spec.traces_endpoint:
        flags["otlp_traces_endpoint"] = spec.traces_endpoint
    given = {key.replace("-", "_").lstrip("_"): value for key, value in spec.engine_args.items()}
    clashes = sorted(set(given) & _OURS)
    if clashes:
        raise ServingError(
            f"engine_args sets {', '.join(clashes)}, which the serving spec's own keys or the endpoint decide. Leave them out."
        )
    return [token for key, value in (flags | given).items() for token in _flag(key, value)]


def _flag(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}"] if value else [] if key in ("disable_log_stats", "disable_fastapi_docs") else [f"--no-{name}"]
    if isinstance(value, (dict, list)):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", str(value)]


def parse(flags: list[str]) -> Namespace:
    """vLLM's arguments. ServingError instead of an exit where vLLM does not take one."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc, unused-ignore]
        def error(self, message: str) -> NoReturn:
            raise ServingError(f"vLLM does not take the engine arguments: {message}. Check engine_args.")

    arguments = make_arg_parser(Parser()).parse_args(flags)
    validate_parsed_serve_args(arguments)
    return arguments


def start_engine(arguments: Namespace, workload: "Workload") -> "AsyncLLM":
    """`workload` is told of each of its steps."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    context = UsageContext.OPENAI_API_SERVER
    return AsyncLLM.from_vllm_config(
        AsyncEngineArgs.from_cli_args(arguments).create_engine_config(usage_context=context),
        usage_context=context,
        stat_loggers=[lambda *_: workload],  # type: ignore[list-item]
    )


def end_engine(engine: "AsyncLLM") -> None:
    """Kills its processes; a hung one does not listen to anything else. Its requests fail as they do when it dies by itself."""
    manager = getattr(getattr(engine.engine_core, "resources", None), "engine_manager", None)
    for process in getattr(manager, "processes", ()):
        process.kill()


async def application(engine: "AsyncLLM", arguments: Namespace, catalog: "Catalog") -> "FastAPI":
    """vLLM's own FastAPI application over the engine, with our table of models in the place of vLLM's."""
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.launchers.app import build_app

    from adaptfleet.on_ray.serve.served_models import ServedModels

    tasks = await engine.get_supported_tasks()
    app = build_app(arguments, supported_tasks=tasks, model_config=engine.model_config)
    ServedModels.catalog = catalog
    with _in_place_of(vars(app_state), "OpenAIServingModels", ServedModels):
        await app_state.init_app_state(engine, app.state, arguments, supported_tasks=tasks)
    if not isinstance(app.state.openai_serving_models, ServedModels):
        raise ServingError("this vLLM makes its table of models elsewhere; use the locked version (requirements/*.lock).")
    # vLLM's handler of a dead engine stops "the server"; the replica ends by its own watch (deployment).
    app.state.server = SimpleNamespace(should_exit=False)
    return app


@contextmanager
def _in_place_of(namespace: Mapping[str, Any], name: str, other: Any) -> Iterator[None]:
    """vLLM has no argument for the class of its table of models; drop this when it gets one."""
    before = namespace[name]
    namespace[name] = other  # type: ignore[index]
    try:
        yield
    finally:
        namespace[name] = before  # type: ignore[index]
