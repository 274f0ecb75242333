"""The process that is a bed: the API, the controllers and the pods. Everyone else talks to it over the API."""

import argparse
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Protocol

from adaptfleet.on_ray.cluster.processes import MARKER, ProcessId, members
from adaptfleet.on_ray.kuberay.api_server import ApiServer
from adaptfleet.on_ray.kuberay.certificates import make_certificates
from adaptfleet.on_ray.kuberay.clusters import Clusters
from adaptfleet.on_ray.kuberay.gateway import Gateway
from adaptfleet.on_ray.kuberay.manifests import admitted
from adaptfleet.on_ray.kuberay.objects import Objects
from adaptfleet.on_ray.kuberay.place import Place
from adaptfleet.on_ray.kuberay.pods import Pods
from adaptfleet.on_ray.kuberay.ray_jobs import RayJobs
from adaptfleet.on_ray.kuberay.ray_services import RayServices

_PERIOD_S = 0.2
API_FILE = "api.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--env", type=json.loads, default={})
    parser.add_argument("--fleet", type=json.loads, default=None)
    args = parser.parse_args()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    run(args.folder, args.code, args.env, args.fleet, stopping)


def run(folder: Path, code: Path, env: dict[str, str], fleet: dict[str, float] | None, stopping: threading.Event) -> None:
    certificates = make_certificates(folder)
    objects = Objects()
    server = ApiServer(objects, certificates, admitted)
    place = Place(folder, os.environ[MARKER], code, env, certificates, server.port)
    pods = Pods(objects, place)
    clusters = Clusters(objects, pods, place, fleet)
    gateway = Gateway()
    server.start()
    gateway.start()
    for part in (RayJobs(objects, place), RayServices(objects, place, gateway)):
        threading.Thread(target=_keep_syncing, args=(part, stopping), name=type(part).__name__, daemon=True).start()
    written = folder / f".{API_FILE}"
    written.write_text(json.dumps({"url": f"https://127.0.0.1:{server.port}"}), encoding="utf-8")
    written.replace(folder / API_FILE)
    try:
        # On this thread, which lives as long as the process: the kernel tells pods of its end.
        _keep_syncing(_InTurn(pods, clusters), stopping)
    finally:
        pods.end_all()
        gateway.stop()
        server.stop()
        left = members(None, place.marker)
        for process in left - {ProcessId.of(os.getpid())}:
            if process is not None:
                process.send(signal.SIGKILL)


class _Part(Protocol):
    def sync(self) -> None: ...


class _InTurn:
    def __init__(self, *parts: _Part) -> None:
        self._parts = parts

    def sync(self) -> None:
        for part in self._parts:
            part.sync()


def _keep_syncing(part: _Part, stopping: threading.Event) -> None:
    """An error is said and the next look tries again, as the operator does."""
    while not stopping.is_set():
        started = time.monotonic()
        try:
            part.sync()
        except Exception:
            traceback.print_exc(file=sys.stderr)
        stopping.wait(max(0.02, _PERIOD_S - (time.monotonic() - started)))


def new_marker() -> str:
    return secrets.token_hex(16)


if __name__ == "__main__":
    main()
