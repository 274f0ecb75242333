"""A steady load on an endpoint: so many clients, one request after the other, every failure kept."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from types import TracebackType
from typing import Any


class Load:
    """`with Load(url, body) as load:`; afterwards `load.sent` and `load.failures`."""

    def __init__(self, url: str, body: dict[str, Any] | None = None, clients: int = 2, pause_s: float = 0.1, headers: Any = None) -> None:
        self._request = urllib.request.Request(url, data=json.dumps(body).encode() if body else None, headers=headers or {})
        if body:
            self._request.add_header("Content-Type", "application/json")
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]
        self.sent = 0
        self.failures: list[tuple[float, str]] = []
        """Seconds since the start, and what was wrong."""
        self.seconds: list[float] = []
        self.answers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def _client(self) -> None:
        while not self._stopping.is_set():
            began, failure, answer = time.monotonic(), None, ""
            try:
                with urllib.request.urlopen(self._request, timeout=120) as reply:
                    answer = reply.read().decode()
            except urllib.error.HTTPError as error:
                failure = f"{error.code} {error.read()[:200]!r}"
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                failure = f"{type(error).__name__}: {error}"
            with self._lock:
                self.sent += 1
                if failure:
                    self.failures.append((round(began - self._began, 1), failure))
                else:
                    self.answers[answer[:60]] += 1
                    self.seconds.append(time.monotonic() - began)
            self._stopping.wait(self._pause_s)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=130)
