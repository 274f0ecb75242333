"""Who is asking, what that tenant may use, and whether its limits admit the request: everything the door asks about tenants."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adaptfleet.contracts.home import home, store_url
from adaptfleet.contracts.tenants import TenantPolicy, TenantsSpec
from adaptfleet.on_ray.serve.accounts import Accounts, Grant
from adaptfleet.on_ray.serve.api_keys import ApiKeys, Caller
from adaptfleet.on_ray.serve.audit import AuditLog
from adaptfleet.on_ray.serve.crowding import Crowd
from adaptfleet.on_ray.serve.fair_order import FairOrder
from adaptfleet.on_ray.serve.ledger import Exchange
from adaptfleet.on_ray.serve.metered_engine import Meter, metered
from adaptfleet.on_ray.serve.policy_file import PolicyFile
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.on_ray.serve.viewer import Viewer

NO_TENANT = "none"
_BYTES_A_TOKEN = 4
_GUESSED_OUTPUT_TOKENS = 256
_MAX_COPIES = 128
_UNCOUNTED = {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}
_OUTPUT_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Tenancy:
    def __init__(self, keys: ApiKeys | None, policies: PolicyFile, max_requests: int) -> None:
        """`keys` None: anybody may call, as the tenant `none`, who sees and may do everything. `max_requests`: what the replica takes."""
        self._keys = keys
        self._policies = policies
        self._merged: tuple[TenantsSpec, dict[str, TenantPolicy]] = (policies.now, {})
        self._crowd = Crowd(max_requests)
        self.accounts = Accounts(time.monotonic)
        self.order = FairOrder()
        self.exchange = Exchange(self.accounts, store_url())
        self.audit = AuditLog(home() / "logs" / "audit", self.exchange.replica)

    @property
    def policies(self) -> TenantsSpec:
        return self._policies.now

    def caller(self, headers: Mapping[bytes, str]) -> Caller:
        """RefusalError: 401."""
        if self._keys is None:
            return Caller(NO_TENANT, "-")
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get(b"x-api-key", "")  # how clients of /v1/messages send it
        if not key:
            raise RefusalError(401, "No API key. Send it as 'Authorization: Bearer KEY'.", "missing_api_key")
        caller = self._keys.caller(key.strip())
        if caller is None:
            raise RefusalError(401, "The API key is not known here.", "invalid_api_key")
        if caller.expired:
            raise RefusalError(401, f"The API key {caller.key_id} has expired. Ask for a new one.", "expired_api_key")
        if not self.is_enabled(caller.tenant):
            raise RefusalError(403, f"The tenant {caller.tenant} is switched off here.", "tenant_disabled")
        return caller

    def policy(self, tenant: str) -> TenantPolicy:
        """Merged with the defaults once for each state of the file."""
        spec = self.policies
        if self._merged[0] is not spec:
            self._merged = (spec, {})
        known = self._merged[1]
        if tenant not in known:
            known[tenant] = spec.policy(tenant)
        return known[tenant]

    def may_see(self, caller: Caller, name: str) -> bool:
        """Whether a model of this name, without version or alias, exists for the caller."""
        return caller.may_name(name) and self.policies.may_see(caller.tenant, name)

    def viewer(self, caller: Caller, request: Mapping[str, Any], request_id: str) -> Viewer:
        """For whom the catalog is read when the caller sends this request."""
        metadata = request.get("metadata")
        user = request.get("user") or request.get("safety_identifier") or (metadata.get("user_id") if isinstance(metadata, dict) else None)
        policies = self.policies
        return Viewer(
            may_see=lambda name: self.may_see(caller, name),
            aliases={**policies.aliases, **self.policy(caller.tenant).aliases},
            user=f"{caller.tenant}\0{user if isinstance(user, str) and user else caller.key_id}",
            request_id=request_id,
        )

    def is_enabled(self, tenant: str) -> bool:
        return self.policy(tenant).enabled

    def known_tenants(self) -> list[str]:
        """Those with a key, a policy or usage."""
        with_keys = self._keys.tenants() if self._keys is not None else [NO_TENANT]
        return sorted({*with_keys, *self.policies.tenants, *self.accounts.tenants()})

    def is_operator(self, caller: Caller) -> bool:
        return self._keys is None or self.policies.is_operator(caller.tenant)

    def max_request_bytes(self, caller: Caller, allowed: int) -> int:
        own = self.policy(caller.tenant).max_request_bytes
        return allowed if own is None else min(allowed, own)

    @contextmanager
    def admitted(self, caller: Caller, path: str, request: Mapping[str, Any], num_bytes: int, klass: str | None = None) -> Iterator[Grant]:
        """The request within its tenant's limits; counted when it ends. `klass` batch or shadow: no limits a minute, lowest priority.

        RefusalError: 429 with the time to wait, or 400.
        """
        policy = self.policy(caller.tenant)
        estimate = 0 if path in _UNCOUNTED else _estimate(request, num_bytes, policy)
        if klass is None:
            self._crowd.enter(caller.tenant, policy.weight)
            try:
                grant = self.accounts.admit(caller.tenant, policy, estimate)
            except BaseException:
                self._crowd.leave(caller.tenant)
                raise
        else:
            if klass == "batch":
                self.accounts.check_budget(caller.tenant, policy)
            grant = Grant(caller.tenant, estimate)
        ticket = self.order.ticket(caller.tenant, klass or policy.priority, policy.weight, estimate)
        isolated_for = caller.tenant if policy.isolate_prefix_cache else None
        token = metered.set(Meter(grant, self.order, ticket, policy.max_context_tokens, policy.max_output_tokens, isolated_for))
        grant.priority = ticket.priority
        try:
            yield grant
        finally:
            metered.reset(token)
            self.order.end(ticket, grant.prompt_tokens + grant.output_tokens)
            if klass is None:
                self.accounts.settle(grant)
                self._crowd.leave(caller.tenant)
            elif klass == "batch":
                self.accounts.count(grant)


def _estimate(request: Mapping[str, Any], num_bytes: int, policy: TenantPolicy) -> int:
    """What a request may take, before the engine has counted it."""
    wanted: int | None = next((request[key] for key in _OUTPUT_KEYS if _is_count(request.get(key))), None)
    if wanted is not None and policy.max_output_tokens is not None and wanted > policy.max_output_tokens:
        raise RefusalError(
            400,
            f"{wanted} tokens of answer are asked for; {policy.max_output_tokens} are allowed (max_output_tokens). Ask for fewer.",
            "max_output_tokens_exceeded",
            next(key for key in _OUTPUT_KEYS if _is_count(request.get(key))),
        )
    if wanted is None:
        wanted = min(_GUESSED_OUTPUT_TOKENS, policy.max_output_tokens or _GUESSED_OUTPUT_TOKENS)
    copies: Any = request.get("n")
    return num_bytes // _BYTES_A_TOKEN + wanted * (min(copies, _MAX_COPIES) if _is_count(copies) else 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
