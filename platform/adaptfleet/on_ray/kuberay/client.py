"""Talks to a bed's API: apply, get, wait, delete."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from adaptfleet.contracts.errors import AdaptfleetError, ContractError
from adaptfleet.on_ray.kuberay.certificates import Certificates
from adaptfleet.on_ray.kuberay.manifests import plural_of
from adaptfleet.on_ray.kuberay.objects import Object

_TIMEOUT_S = 30.0


class KubeClient:
    def __init__(self, folder: Path) -> None:
        from adaptfleet.on_ray.kuberay.bed import API_FILE

        self._url = json.loads((folder / API_FILE).read_text(encoding="utf-8"))["url"]
        files = Certificates(folder)
        self._session = requests.Session()
        self._session.trust_env = False
        certificate, key = files.client
        self._session.cert = str(certificate), str(key)
        self._session.verify = str(files.authority)

    def apply(self, thing: Object) -> Object:
        """Creates it, or brings what exists to what is given. ContractError: the API refuses it."""
        meta = thing["metadata"]
        path = self._path(thing["apiVersion"], plural_of(thing["kind"]), meta.get("namespace", "default"), meta["name"])
        reply = self._session.patch(
            path, data=json.dumps(thing), headers={"Content-Type": "application/apply-patch+yaml"}, timeout=_TIMEOUT_S
        )
        if reply.status_code == 422:
            raise ContractError(f"{thing['kind']} {meta['name']!r}: {reply.json()['message']}")
        return self._checked(reply)

    def get(self, kind: str, name: str, namespace: str = "default") -> Object | None:
        reply = self._session.get(self._path(_api(kind), plural_of(kind), namespace, name), timeout=_TIMEOUT_S)
        return None if reply.status_code == 404 else self._checked(reply)

    def listed(self, kind: str, namespace: str | None = None, **labels: str) -> list[Object]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        reply = self._session.get(
            self._path(_api(kind), plural_of(kind), namespace), params={"labelSelector": selector}, timeout=_TIMEOUT_S
        )
        return list(self._checked(reply)["items"])

    def pods(self, cluster: str, group: str | None = None) -> list[Object]:
        """Of a RayCluster, those going away left out."""
        selector = f"ray.io/cluster={cluster}" + (f",ray.io/group={group}" if group else "")
        reply = self._session.get(self._path("v1", "pods", None), params={"labelSelector": selector}, timeout=_TIMEOUT_S)
        return [pod for pod in self._checked(reply)["items"] if "deletionTimestamp" not in pod["metadata"]]

    def patch(self, kind: str, name: str, change: Object, namespace: str = "default") -> Object:
        path = self._path(_api(kind), plural_of(kind), namespace, name)
        headers = {"Content-Type": "application/merge-patch+json"}
        return self._checked(self._session.patch(path, data=json.dumps(change), headers=headers, timeout=_TIMEOUT_S))

    def delete(self, kind: str, name: str, namespace: str = "default", grace_s: float | None = None) -> None:
        """Of a pod, `grace_s` 0 is a machine lost without notice, and more is one taken back with it. Fine where it has gone."""
        query = {} if grace_s is None else {"gracePeriodSeconds": str(grace_s)}
        reply = self._session.delete(self._path(_api(kind), plural_of(kind), namespace, name), params=query, timeout=_TIMEOUT_S)
        if reply.status_code != 404:
            self._checked(reply)

    def wait(self, until: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """What `until` gives, once it is something."""
        end = time.monotonic() + timeout_s
        while True:
            found = until()
            if found:
                return found
            if time.monotonic() > end:
                raise AdaptfleetError(f"{what} did not come within {timeout_s:.0f} s")
            time.sleep(0.1)

    def _path(self, api: str, plural: str, namespace: str | None, name: str | None = None) -> str:
        root = f"{self._url}/{'apis' if '/' in api else 'api'}/{api}"
        return root + (f"/namespaces/{namespace}" if namespace else "") + f"/{plural}" + (f"/{name}" if name else "")

    def _checked(self, reply: requests.Response) -> Object:
        if not reply.ok:
            message = reply.json().get("message", reply.text) if "json" in reply.headers.get("Content-Type", "") else reply.text
            raise AdaptfleetError(f"the API answered {reply.status_code}: {message}")
        return dict(reply.json())


def _api(kind: str) -> str:
    return "ray.io/v1" if kind.startswith("Ray") else "v1"
