"""The Kubernetes API over HTTPS on loopback, for those who hold the client's certificate: what Ray's autoscaler and kubectl need."""

import http.server
import json
import re
import ssl
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

import yaml

from adaptfleet.on_ray.kuberay.certificates import Certificates
from adaptfleet.on_ray.kuberay.objects import ACTED_ON, POD, ConflictError, Kind, NotFoundError, Object, Objects, merge, patched

_PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[a-z0-9.-]+/v\w+))(?:/namespaces/(?P<namespace>[a-z0-9-]+))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[a-z0-9.-]+))?(?:/(?P<sub>status|eviction))?$"
)
_MAX_BYTES = 4 * 1024 * 1024

Admit = Callable[[str, Object], Object]
"""Gets the plural and the object about to be stored; returns it with its defaults, or raises ValueError."""


class ApiServer:
    def __init__(self, objects: Objects, certificates: Certificates, admit: Admit) -> None:
        handler = type("BoundHandler", (_Handler,), {"objects": objects, "admit": staticmethod(admit)})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificates.server)
        context.load_verify_locations(certificates.authority)
        context.verify_mode = ssl.CERT_REQUIRED
        # The handshake is made in the request's own thread: a client that says nothing holds up nobody.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, name="api-server", daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    objects: Objects
    admit: Admit

    def log_message(self, *_: Any) -> None:
        """Nothing: the autoscaler asks every second."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in _DISCOVERY:
            self._answer(200, _DISCOVERY[path])
            return
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._post)

    def do_PUT(self) -> None:
        self._handle(self._put)

    def do_PATCH(self) -> None:
        self._handle(self._patch)

    def do_DELETE(self) -> None:
        self._handle(self._delete)

    def _get(self, plural: str, namespace: str | None, name: str | None, query: dict[str, str]) -> tuple[int, Object]:
        if name is not None:
            return 200, self.objects.get(plural, namespace or "default", name)
        labels = dict(part.split("=", 1) for part in query.get("labelSelector", "").replace("==", "=").split(",") if "=" in part)
        items = self.objects.listed(plural, namespace, labels)
        kind = next((known.kind for known in ACTED_ON if known.plural == plural), items[0]["kind"] if items else "Unknown")
        api = items[0]["apiVersion"] if items else next((known.api for known in ACTED_ON if known.plural == plural), "v1")
        return 200, {"kind": f"{kind}List", "apiVersion": api, "metadata": {"resourceVersion": self.objects.version}, "items": items}

    def _post(self, plural: str, namespace: str | None, name: str | None, query: dict[str, str]) -> tuple[int, Object]:
        body = self._body()
        if name is not None and self._sub == "eviction" and plural == POD.plural:
            grace = body.get("deleteOptions", {}).get("gracePeriodSeconds")
            return 201, self.objects.delete(plural, namespace or "default", name, grace)
        body.setdefault("metadata", {}).setdefault("namespace", namespace or "default")
        return 201, self.objects.create(plural, self.admit(plural, body))

    def _put(self, plural: str, namespace: str | None, name: str | None, query: dict[str, str]) -> tuple[int, Object]:
        body = self._body()
        return 200, self._store(plural, namespace, name, lambda old: {**body, "metadata": {**old["metadata"], **body["metadata"]}})

    def _patch(self, plural: str, namespace: str | None, name: str | None, query: dict[str, str]) -> tuple[int, Object]:
        body = self._body()
        if isinstance(body, list):
            return 200, self._store(plural, namespace, name, lambda old: patched(old, body))
        if "apply-patch" in self.headers.get("Content-Type", "") and self.objects.find(plural, namespace or "default", name or "") is None:
            body["metadata"].setdefault("namespace", namespace or "default")
            return 201, self.objects.create(plural, self.admit(plural, body))
        return 200, self._store(plural, namespace, name, lambda old: merge(old, body))

    def _delete(self, plural: str, namespace: str | None, name: str | None, query: dict[str, str]) -> tuple[int, Object]:
        if name is None:
            raise NotFoundError("a collection cannot be deleted here; name one object")
        grace = query.get("gracePeriodSeconds")
        grace = self._body().get("gracePeriodSeconds") if grace is None else grace
        return 200, self.objects.delete(plural, namespace or "default", name, None if grace is None else float(grace))

    def _store(self, plural: str, namespace: str | None, name: str | None, edit: Callable[[Object], Object]) -> Object:
        def checked(old: Object) -> Object:
            before = json.dumps(old.get("spec"), sort_keys=True)
            new = edit(old)
            return new if json.dumps(new.get("spec"), sort_keys=True) == before else self.admit(plural, new)

        return self.objects.change(plural, namespace or "default", name or "", checked)

    def _handle(self, method: Callable[[str, str | None, str | None, dict[str, str]], tuple[int, Object]]) -> None:
        url = urllib.parse.urlsplit(self.path)
        found = _PATH.match(url.path)
        self._sub = found["sub"] if found else None
        try:
            if found is None:
                raise NotFoundError(f"no such path: {url.path}")
            query = dict(urllib.parse.parse_qsl(url.query))
            self._answer(*method(found["plural"], found["namespace"], found["name"], query))
        except NotFoundError as error:
            self._fail(404, "NotFound", str(error))
        except ConflictError as error:
            self._fail(409 if method == self._post else 422, "Conflict", str(error))
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            self._fail(422, "Invalid", str(error))

    def _body(self) -> Any:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _MAX_BYTES:
            self.close_connection = True
            raise ValueError(f"the body has {length} bytes; {_MAX_BYTES} are allowed")
        # kubectl applies YAML, which JSON is too
        return (yaml.safe_load(self.rfile.read(length)) or {}) if length else {}

    def _fail(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code}
        self._answer(code, status)

    def _answer(self, code: int, thing: Object) -> None:
        body = json.dumps(thing).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _resource(kind: Kind) -> Object:
    verbs = ["create", "delete", "get", "list", "patch", "update"]
    return {"name": kind.plural, "singularName": kind.kind.lower(), "namespaced": True, "kind": kind.kind, "verbs": verbs}


def _resources(api: str) -> Object:
    listed = [_resource(kind) for kind in ACTED_ON if kind.api == api]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": listed}


_RAY = {"groupVersion": "ray.io/v1", "version": "v1"}
_RAY_GROUP = {"name": "ray.io", "versions": [_RAY], "preferredVersion": _RAY}
_DISCOVERY: dict[str, Object] = {
    "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0", "platform": "adaptfleet dev"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_RAY_GROUP]},
    "/api/v1": _resources("v1"),
    "/apis/ray.io/v1": _resources("ray.io/v1"),
}
