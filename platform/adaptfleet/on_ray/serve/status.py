"""`/status`: what a caller may know of the endpoint's models, tenants and engine, as JSON; and the page at `/` that draws it.

An operator sees every tenant; anybody else, oneself. Requests and tokens by model are of the replica that answers; what tenants have in
flight and have used is of all replicas, as the ledger tells it.
"""

import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from prometheus_client import REGISTRY

from adaptfleet.contracts.tenants import TenantPolicy
from adaptfleet.on_ray.serve.api_keys import Caller
from adaptfleet.on_ray.serve.asgi import Receive, Scope, Send, answer
from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.on_ray.serve.tenancy import Tenancy
from adaptfleet.store.records import AliasSplit

_ENGINE = {
    "vllm:num_requests_running": "requests running",
    "vllm:num_requests_waiting": "requests waiting",
    "vllm:kv_cache_usage_perc": "KV cache used, %",
}
_PAGE = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/page.js": ("page.js", b"text/javascript"),
    "/page.css": ("page.css", b"text/css"),
}


def page() -> dict[str, tuple[bytes, bytes]]:
    """The page's files by path: content type and bytes. They hold nothing secret."""
    folder = files("adaptfleet.on_ray.serve") / "page"
    return {path: (content_type, (folder / name).read_bytes()) for path, (name, content_type) in _PAGE.items()}


class Status:
    def __init__(
        self, catalog: Catalog, tenancy: Tenancy, others: Callable[[Caller], Awaitable[list[dict[str, Any]]]] | None = None
    ) -> None:
        """`others`: what replicas of the other bases say (`here`)."""
        self._others = others
        self._catalog = catalog
        self._tenancy = tenancy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "GET":
            raise RefusalError(405, f"/status takes GET, not {scope['method']}.", "method_not_allowed")
        await answer(send, 200, json.dumps(await self.of(scope["adaptfleet.caller"])).encode())

    async def of(self, caller: Caller) -> dict[str, Any]:
        is_operator = self._tenancy.is_operator(caller)
        here = self.here(caller)
        told = [here, *(await self._others(caller) if self._others is not None else ())]
        bases = {one["base"]: {key: one[key] for key in ("base", "replica", "engine")} for one in told}
        return {
            **bases[self._catalog.base_id],
            "bases": [bases[base_id] for base_id in self._catalog.base_ids if is_operator or self._tenancy.may_see(caller, base_id)],
            "models": await self._models(caller, [one["counted"] for one in told]),
            "tenants": [self._tenant(name) for name in (self._tenants(caller) if is_operator else [caller.tenant])],
        }

    def here(self, caller: Caller) -> dict[str, Any]:
        """What this replica alone knows: its engine, and requests and tokens by model."""
        is_operator = self._tenancy.is_operator(caller)
        return {
            "base": self._catalog.base_id,
            "replica": self._tenancy.exchange.replica[:12],
            "engine": _engine() if is_operator else {},
            "counted": {model: dict(counts) for model, counts in _counted(None if is_operator else caller.tenant).items()},
        }

    async def _models(self, caller: Caller, counted: list[dict[str, dict[str, int]]]) -> list[dict[str, Any]]:
        viewer = self._tenancy.viewer(caller, {}, "")
        splits = await self._catalog.splits(viewer)
        rows = []
        for card in await self._catalog.cards(viewer):
            kind = "base" if card.id in self._catalog.base_ids else "alias" if card.id in viewer.aliases else "adapter"
            counts = {name: sum(one.get(card.id, {}).get(name, 0) for one in counted) for name in _COUNTS}
            rows.append({"id": card.id, "kind": kind, "traffic": _traffic(splits.get(card.id)) or card.means, **counts})
        return rows

    def _tenants(self, caller: Caller) -> list[str]:
        return sorted({caller.tenant, *self._tenancy.known_tenants()})

    def _tenant(self, tenant: str) -> dict[str, Any]:
        accounts, policy = self._tenancy.accounts, self._tenancy.policy(tenant)
        today, month = accounts.spent(tenant, "day"), accounts.spent(tenant, "month")
        return {
            "tenant": tenant,
            "priority": policy.priority,
            "in_flight": accounts.in_flight(tenant),
            "requests_today": today.requests,
            "tokens_today": today.tokens,
            "tokens_this_month": month.tokens,
            "limits": _limits(policy),
        }


_COUNTS = ("requests", "errors", "output_tokens")


def _counted(tenant: str | None) -> Mapping[str, Mapping[str, int]]:
    """By model; of one tenant, or of all."""
    counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTS, 0))
    wanted = {"adaptfleet_requests_total": "requests", "adaptfleet_errors_total": "errors", "adaptfleet_tokens_total": "output_tokens"}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            count, labels = wanted.get(sample.name), sample.labels
            if count is None or labels["tenant"] == "shadow" or (tenant is not None and labels["tenant"] != tenant):
                continue
            if labels.get("kind", "output") == "output":
                counts[labels["model"]][count] += int(sample.value)
    return counts


def _engine() -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name in _ENGINE:
                scale = 100 if sample.name.endswith("_perc") else 1
                found[_ENGINE[sample.name]] = round(found.get(_ENGINE[sample.name], 0.0) + sample.value * scale, 1)
    return found


def _limits(policy: TenantPolicy) -> str:
    parts = [
        (policy.requests_per_min, "requests/min"),
        (policy.tokens_per_min, "tokens/min"),
        (policy.max_concurrent, "at once"),
        (policy.token_budget and policy.token_budget.tokens, f"tokens/{policy.token_budget.per}" if policy.token_budget else ""),
    ]
    return ", ".join(f"{limit:,} {unit}" for limit, unit in parts if limit) or "none"


def _traffic(split: AliasSplit | None) -> str:
    if split is None:
        return ""
    total = sum(share.weight for share in split.shares)
    parts = [f"v{share.version} {100 * share.weight / total:.4g}%" for share in split.shares]
    return ", ".join(parts + ([f"shadow v{split.shadow.version} {split.shadow.weight:.4g}%"] if split.shadow else []))
