"""Runs the endpoint on this machine, on a local cluster of its own that outlives the command."""

import argparse
import json
import os
import socket
from pathlib import Path

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.loading import load_contract, parse_contract
from adaptfleet.contracts.serving import ServingSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="a serving contract; without it, the embedded base with the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key; may be given several times")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network; keys are then all that protects it")


def run(args: argparse.Namespace) -> int:
    spec = load_contract(ServingSpec, args.config, args.set) if args.config else parse_contract(ServingSpec, "", args.set, origin="--set")
    from adaptfleet.on_ray.cluster.ingress import USE_HAPROXY
    from adaptfleet.on_ray.cluster.interruption import stop_on_signal
    from adaptfleet.on_ray.cluster.record import default_record
    from adaptfleet.on_ray.local_cluster import LocalCluster

    stop_on_signal()
    cluster = LocalCluster.attach(default_record(), logs_to=home() / "logs")
    if cluster is not None and cluster.is_owned_by_living:
        raise ServingError("a quickstart is running on this home's local cluster. Wait until it ends, or end it with `adaptfleet stop`.")
    attached = cluster is not None
    if cluster is None:
        check_port(args.host, args.port)
        LocalCluster.clear(default_record())
        cores = len(os.sched_getaffinity(0))
        print("starting a local Ray cluster ...", flush=True)
        # The replica's cores, and all of them once more for jobs: whichever is idle leaves them to the other.
        # HTTPS is Serve's own proxy's; HAProxy's configuration has no place for it.
        env = {USE_HAPROXY: "0"} if spec.tls else None
        cluster = LocalCluster.start(2 * cores, detached=True, record_file=default_record(), logs_to=home() / "logs", env=env)
    endpoint = cluster.folder / "endpoint.json"
    try:
        if attached and endpoint.is_file():
            runs_at = json.loads(endpoint.read_text(encoding="utf-8"))
            if (runs_at["host"], runs_at["port"]) != (args.host, args.port):
                raise ServingError(f"the endpoint runs at {runs_at['host']}:{runs_at['port']}. To move it, run `adaptfleet stop` first.")
        os.environ.update(cluster.env)
        # Ray reads its environment when it is imported.
        from adaptfleet.on_ray.serve.deploy import deploy

        ids = " and ".join(base.base_id() for base in spec.bases())
        print(f"starting the endpoint with {ids}; an engine takes about half a minute ...", flush=True)
        url = deploy(spec, host=args.host, port=args.port)
        endpoint.write_text(json.dumps({"host": args.host, "port": args.port}), encoding="utf-8")
    except BaseException:
        if not attached:
            cluster.stop()
        raise
    _say_how_to_use(url, spec)
    return 0


def check_port(host: str, port: int) -> None:
    """ServingError, before anything is started, when something else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(f"{host}:{port} cannot be used: {error.strerror}. Choose another with --port.") from None


def _say_how_to_use(url: str, spec: ServingSpec) -> None:
    print(f"\nThe endpoint answers at {url}/v1")
    header, key = "", '"none"'
    bases = "these bases" if spec.more_bases else "this base"
    if spec.auth == "api-key":
        from adaptfleet.on_ray.serve.key_file import client_key_file, ensure_keys

        where = ensure_keys()
        print(f"API keys, by their hashes: {where}; `adaptfleet keys` adds, rotates and revokes them")
        if Path(where).is_file() and client_key_file().is_file():
            print(f'  export OPENAI_API_KEY="$(cat {client_key_file()})"')
        header, key = ' -H "Authorization: Bearer $OPENAI_API_KEY"', 'os.environ["OPENAI_API_KEY"]'
    print(
        f"""
  curl {url}/v1/models{header}
  curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' \\
    -d '{{"model": "{spec.base_id()}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

  import os
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  client.chat.completions.create(model="{spec.base_id()}", messages=[{{"role": "user", "content": "Hello"}}])

Every published adapter of {bases} is a model there too: `adaptfleet models list`. Stop it all: `make stop`."""
    )
