"""Who shares an endpoint, and what each may have of it: `tenants.yaml`, read again whenever it changes."""

from collections.abc import Collection
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from adaptfleet.contracts.artifacts import Sha256
from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.names import SafeName

Priority = Literal["high", "normal", "low"]
Pattern = Annotated[str, Field(pattern=r"^[a-z0-9*?._-]{1,64}$")]
"""A model's name without version or alias; `*` and `?` as in a shell."""
Patterns = Annotated[tuple[Pattern, ...], Field(strict=False)]
FIRST_TENANT = "default"
"""The tenant of the key that the first start makes: whoever set the endpoint up."""


class Budget(Spec):
    tokens: Annotated[int, Field(ge=1)]
    per: Literal["day", "month", "ever"] = "month"
    """Days and months of UTC."""


class TenantPolicy(Spec):
    """One tenant's limits and rights. None: no limit. A key left out has the value that `defaults` gives it."""

    requests_per_min: Annotated[int, Field(ge=1)] | None = None
    tokens_per_min: Annotated[int, Field(ge=1)] | None = None
    """Prompt and answer together, as the engine counts them."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests in flight."""
    token_budget: Budget | None = None
    priority: Priority = "normal"
    """A higher class is always scheduled before a lower one; batches come after all of them."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """The share of the engine among the tenants of one class, when there is not enough for all."""
    models: Patterns = ("*",)
    """Names of models that the tenant may use, the base among them."""
    owns: Patterns = ()
    """Names that belong to this tenant: for all others they do not exist."""
    aliases: dict[SafeName, str] = {}
    """Further names for models, for this tenant; before those that all have."""
    operator: bool | None = None
    """May see everybody's usage and `/metrics`. None: only the tenant `default` may."""
    enabled: bool = True
    max_request_bytes: Annotated[int, Field(ge=256)] | None = None
    max_context_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt and answer of one request."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_request_s: Annotated[float, Field(gt=0)] | None = None
    """From the request's arrival to the end of its answer."""
    isolate_prefix_cache: bool = False
    """True: the engine's prefix cache is not shared with other tenants, whose times could tell which prompts they sent."""

    @field_validator("max_request_s", "weight", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: object) -> object:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class TenantsSpec(Spec):
    defaults: TenantPolicy = TenantPolicy()
    """For every tenant, named here or only by a key."""
    tenants: dict[SafeName, TenantPolicy] = {}
    aliases: dict[SafeName, str] = {}
    """Further names for models, such as `gpt-4o-mini: smollm2-135m`."""
    audit_prompts: bool = False
    """True: the audit log holds the bodies of requests too."""

    @model_validator(mode="after")
    def _owned_once(self) -> "TenantsSpec":
        if self.defaults.owns:
            raise ValueError("defaults.owns: a name belongs to one tenant; name it under that tenant.")
        owners: dict[str, str] = {}
        twice = []
        for tenant, policy in self.tenants.items():
            for pattern in policy.owns:
                if pattern in owners:
                    twice.append(f"{pattern!r} ({owners[pattern]} and {tenant})")
                owners[pattern] = tenant
        if twice:
            raise ValueError(f"owned by two tenants: {', '.join(twice)}")
        return self

    def policy(self, tenant: str) -> TenantPolicy:
        """The tenant's own keys laid over the defaults."""
        own = self.tenants.get(tenant)
        if own is None:
            return self.defaults
        return self.defaults.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})

    def is_operator(self, tenant: str) -> bool:
        operator = self.policy(tenant).operator
        return tenant == FIRST_TENANT if operator is None else operator

    def may_see(self, tenant: str, name: str) -> bool:
        """Whether a model of this name exists for the tenant."""
        owners = [owner for owner, policy in self.tenants.items() if matches(policy.owns, name)]
        return tenant in owners if owners else matches(self.policy(tenant).models, name)

    def aliases_of(self, models: Collection[str]) -> set[str]:
        """Further names, anybody's, of these models (names without version or alias)."""
        every = [self.aliases, self.defaults.aliases, *(policy.aliases for policy in self.tenants.values())]
        return {name for aliases in every for name, meant in aliases.items() if meant.rpartition(":")[2].partition("@")[0] in models}

    def alias(self, tenant: str, name: str) -> str:
        """What a name stands for; itself where it is no alias."""
        return self.policy(tenant).aliases.get(name) or self.aliases.get(name, name)


class KeyRecord(Spec):
    """An API key as it is kept: what it may do, and its SHA-256."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]{4,32}$")]
    """Names the key in commands and logs; says nothing of the key."""
    tenant: SafeName
    sha256: Sha256
    models: Patterns = ("*",)
    """Narrows what the tenant may use."""
    created_at: Annotated[datetime, Field(strict=False)] | None = None
    expires_at: Annotated[datetime, Field(strict=False)] | None = None
    note: Annotated[str, Field(max_length=200)] = ""

    @field_validator("created_at", "expires_at")
    @classmethod
    def _with_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("a time has its zone, such as 2030-01-31T12:00:00+00:00")
        return value


def matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
