"""The OpenAI-compatible endpoint, for `serve run` and `serve deploy`: see openai.yaml. `args` is a serving spec."""

import json
from typing import Any

from ray.serve import Application

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.serve.deployment import build


def app(args: dict[str, Any]) -> Application:
    """ContractError lists every key that is wrong."""
    spec = parse_contract(ServingSpec, json.dumps(args), origin="args of serve_apps.openai")
    if spec.tls is not None:
        raise ContractError("args.tls: here Serve itself opens the port. Put ssl_certfile and ssl_keyfile under http_options instead.")
    return build(spec)
