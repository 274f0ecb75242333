"""The head's REST interface: jobs and Serve, as the operator uses it."""

from pathlib import Path
from typing import Any

import requests

_TIMEOUT_S = 10.0
_DEPLOY_TIMEOUT_S = 60.0
"""The first configuration starts Serve."""


class DashboardError(Exception):
    """It did not answer, or refused."""


class Dashboard:
    def __init__(self, url: str, token_file: Path) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token_file.read_text(encoding='utf-8').strip()}"}

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """None: no such job."""
        reply = self._ask("GET", f"/api/jobs/{submission_id}")
        return None if reply.status_code == 404 else self._json(reply)

    def submit(self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any], extra: dict[str, Any]) -> None:
        body = {"entrypoint": entrypoint, "submission_id": submission_id, "runtime_env": runtime_env, **extra}
        self._json(self._ask("POST", "/api/jobs/", body))

    def stop(self, submission_id: str) -> None:
        self._json(self._ask("POST", f"/api/jobs/{submission_id}/stop", {}))

    def deploy(self, config: dict[str, Any]) -> None:
        reply = self._ask("PUT", "/api/serve/applications/", config, _DEPLOY_TIMEOUT_S)
        if not reply.ok:
            raise DashboardError(f"Serve refuses the configuration: {reply.status_code} {reply.text[:500]}")

    def applications(self) -> dict[str, dict[str, Any]]:
        return dict(self._json(self._ask("GET", "/api/serve/applications/?api_type=declarative"))["applications"])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> requests.Response:
        try:
            return requests.request(method, self._url + path, json=body, headers=self._headers, timeout=timeout_s)
        except requests.RequestException as error:
            raise DashboardError(f"the dashboard at {self._url} does not answer: {type(error).__name__}") from None

    def _json(self, reply: requests.Response) -> dict[str, Any]:
        if not reply.ok:
            raise DashboardError(f"the dashboard answered {reply.status_code}: {reply.text[:500]}")
        try:
            return dict(reply.json())
        except ValueError:
            raise DashboardError(f"the dashboard answered no JSON: {reply.text[:200]}") from None
