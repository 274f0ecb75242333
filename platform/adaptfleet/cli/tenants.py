"""`adaptfleet tenants`: each tenant's policy as the endpoint would read it, or all that is wrong with the file."""

import argparse
import json
from pathlib import Path

from adaptfleet.cli.tables import print_table
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.tenants import FIRST_TENANT, TenantPolicy, TenantsSpec
from adaptfleet.on_ray.serve.policy_file import policy_file, read_policies

_EPILOG = """\
  adaptfleet tenants                            the file in force: tenants.yaml in ADAPTFLEET_HOME, or ADAPTFLEET_TENANTS
  adaptfleet tenants --file new-tenants.yaml    look before you put it in place
  adaptfleet tenants --see acme-chat            who may use a model of this name"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--file", metavar="FILE.yaml", help="another file than the one in force")
    parser.add_argument("--see", metavar="NAME", help="tell who may use a model of this name")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.file and not Path(args.file).is_file():
        raise ContractError(f"{args.file} is no file.")
    spec = read_policies(Path(args.file) if args.file else policy_file())
    # A tenant that has only a key has the defaults; the first one is among them.
    names = sorted({FIRST_TENANT, *spec.tenants})
    if args.json:
        print(json.dumps({name: _facts(spec, name, args.see) for name in names}, indent=2))
        return 0
    columns = ["tenant", "class", "limits", "models", "owns", "operator", *([f"may use {args.see}"] if args.see else [])]
    rows = []
    for name in names:
        policy = spec.policy(name)
        row = [name, policy.priority, _limits(policy), " ".join(policy.models), " ".join(policy.owns) or "-", _yes(spec.is_operator(name))]
        rows.append(row + ([_yes(spec.may_see(name, args.see))] if args.see else []))
    print_table(columns, rows)
    return 0


def _facts(spec: TenantsSpec, name: str, see: str | None) -> dict[str, object]:
    facts: dict[str, object] = spec.policy(name).model_dump(mode="json") | {"operator": spec.is_operator(name)}
    return facts | ({"may_see": spec.may_see(name, see)} if see else {})


def _limits(policy: TenantPolicy) -> str:
    given = policy.model_dump(exclude_none=True, include={name for name in TenantPolicy.model_fields if name.startswith("max_")})
    given |= {name: value for name in ("requests_per_min", "tokens_per_min") if (value := getattr(policy, name)) is not None}
    if policy.token_budget is not None:
        given["token_budget"] = f"{policy.token_budget.tokens}/{policy.token_budget.per}"
    if not policy.enabled:
        given["enabled"] = "false"
    return " ".join(f"{name}={value}" for name, value in given.items()) or "-"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
