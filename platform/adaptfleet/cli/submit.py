"""Runs a program of jobs/ on the local cluster, or on the one that RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, by `ray job submit`."""

import argparse
import os
from pathlib import Path

from adaptfleet.contracts.errors import ContractError

_EPILOG = """\
  adaptfleet submit jobs/finetune.py --config jobs/configs/finetune_address.yaml --set train.epochs=2

The folder you are in is uploaded, less what no job needs. The contract is checked here first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("program", metavar="jobs/PROGRAM.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")


def run(args: argparse.Namespace) -> int:
    import subprocess
    import sys

    program = Path(args.program)
    if not program.is_file() or program.is_absolute():
        raise ContractError(
            f"{args.program!r} is no program in this folder. Go to the repository's folder and name one, such as jobs/finetune.py."
        )
    checked = subprocess.run([sys.executable, str(program), *args.arguments, "--dry-run"], stdout=subprocess.DEVNULL, check=False)
    if checked.returncode:
        return checked.returncode
    from adaptfleet.on_ray.cluster.record import default_record
    from adaptfleet.on_ray.cluster.submission import submit_job
    from adaptfleet.on_ray.local_cluster import LocalCluster

    argv = ["python", args.program, *args.arguments]
    cluster = LocalCluster.attach(default_record())
    if cluster is not None:
        return cluster.submit(argv, Path.cwd(), env=places(), check=False)
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ContractError(
            "there is no cluster to submit to: no local one of this ADAPTFLEET_HOME runs, and RAY_API_SERVER_ADDRESS is not set. "
            "Start one with `make serve`, set the variable (http://host:8265), or run the program directly with python."
        )
    # Another machine has another home; the store is the one thing that both must share.
    store = {name: value for name, value in places().items() if name == "ADAPTFLEET_STORE"}
    return submit_job(address, argv, Path.cwd(), store, os.environ, lambda line: print(line, flush=True))[0]


def places() -> dict[str, str]:
    """Where home and store are, for a job on this machine."""
    return {name: os.environ[name] for name in ("ADAPTFLEET_HOME", "ADAPTFLEET_STORE") if os.environ.get(name)}
