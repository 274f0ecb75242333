"""The Serve application's arguments, and vLLM's flags made of them."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from adaptfleet.contracts.errors import ContractError, ServingError
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.serve.engine import argv, parse
from serve_apps.openai import app

CONFIG = Path(__file__).resolve().parents[2] / "serve_apps" / "openai.yaml"


def test_the_shipped_config_is_one_serve_takes_and_its_args_are_a_spec() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = config.applications
    assert config.http_options.host == "127.0.0.1"
    assert application.import_path == "serve_apps.openai:app"
    app(application.args)


def test_every_misspelt_argument_is_listed() -> None:
    with pytest.raises(ContractError) as raised:
        app({"max_lora": 4, "model": {"sourc": "x"}, "auth": "basic", "max_lora_rank": 7})
    message = str(raised.value)
    assert "4 things are wrong" in message
    for said in ("max_lora: unknown key. Did you mean", "model.sourc: unknown key. Did you mean 'source'", "auth:", "max_lora_rank:"):
        assert said in message


def test_tls_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ContractError, match="ssl_certfile and ssl_keyfile under http_options"):
        app({"tls": {"certificate": "a", "key": "b"}})


def test_the_spec_in_vllms_flags() -> None:
    spec = ServingSpec(max_loras=3, max_cpu_loras=2, engine_args={"tensor_parallel_size": 2, "enable_prefix_caching": False})
    arguments = parse(argv(spec, Path("/models/x"), "bfloat16"))
    assert (arguments.model, arguments.served_model_name, arguments.dtype) == ("/models/x", ["smollm2-135m"], "bfloat16")
    assert (arguments.enable_lora, arguments.max_loras, arguments.max_cpu_loras, arguments.max_lora_rank) == (True, 3, 3, 64)
    assert (arguments.tensor_parallel_size, arguments.enable_prefix_caching) == (2, False)
    assert arguments.enforce_eager is True
    assert arguments.trust_remote_code is False


def test_engine_args_that_vllm_does_not_know_are_named() -> None:
    with pytest.raises(ServingError, match="tensor-paralel-size"):
        parse(argv(ServingSpec(engine_args={"tensor_paralel_size": 2}), Path("/models/x"), "bfloat16"))


def test_engine_args_may_not_undo_the_spec() -> None:
    with pytest.raises(ServingError, match="lora_modules, middleware, trust_remote_code"):
        argv(ServingSpec(engine_args={"trust_remote_code": True, "lora-modules": "x", "middleware": "y"}), Path("/models/x"), "bfloat16")
