"""`adaptfleet keys`: who may call the endpoint. Keys are shown once, when they are made; what is kept is their hash."""

import argparse
import json
import re
import sys
from datetime import UTC, datetime, timedelta

from adaptfleet.cli.tables import print_table
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.tenants import KeyRecord
from adaptfleet.on_ray.serve.key_file import add_key, hash_plain_keys, keys_file, read_keys, revoke_key, rotate_key, save_client_key

_EPILOG = """\
The endpoint sees a change within about a second; nothing is restarted. Limits: `tenants.yaml` in ADAPTFLEET_HOME, docs/tenancy.md.

  adaptfleet keys add acme                               prints the key: it is not shown again
  adaptfleet keys add acme --models 'address*' --expires 30d --note 'batch jobs'
  adaptfleet keys rotate k-3f9a1c20b7 --grace 24h        a new key; the old one is good for a day more
  adaptfleet keys revoke k-3f9a1c20b7
  adaptfleet keys hash                                   replaces keys in the clear, of earlier versions, by their hashes"""
_SPAN = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    add = actions.add_parser("add", help="make a key for a tenant and print it")
    add.add_argument("tenant", metavar="TENANT")
    add.add_argument(
        "--models", nargs="+", default=["*"], metavar="PATTERN", help="names of models the key may use (default: all of the tenant's)"
    )
    add.add_argument("--expires", metavar="WHEN", help="30d, 12h, or a time such as 2030-01-31T12:00:00+00:00")
    add.add_argument("--note", default="", help="for people; kept beside the key")
    add.add_argument("--save", action="store_true", help="also make it the key of this machine's own tools (client-key in ADAPTFLEET_HOME)")
    listing = actions.add_parser("list", help="every key: its id, tenant, scope and end; never the key")
    rotate = actions.add_parser("rotate", help="make a new key with the same rights; the old one ends after a grace time")
    rotate.add_argument("id", metavar="ID")
    rotate.add_argument(
        "--grace", default="24h", metavar="TIME", help="how long the old one is still good: 24h, 7d, 0s (default: %(default)s)"
    )
    rotate.add_argument("--save", action="store_true", help="also make it the key of this machine's own tools")
    revoke = actions.add_parser("revoke", help="end a key now")
    revoke.add_argument("id", metavar="ID")
    hashing = actions.add_parser("hash", help="replace keys in the clear by their hashes")
    for action in (add, listing, rotate, revoke, hashing):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    match args.action:
        case "add":
            key, record = add_key(args.tenant, tuple(args.models), _end(args.expires), args.note)
            return _show_new(key, record, args, [])
        case "list":
            return _list(sorted(read_keys().values(), key=lambda record: (record.tenant, record.id)), args.json)
        case "rotate":
            key, record, ended = rotate_key(args.id, _span(args.grace))
            return _show_new(key, record, args, [f"{ended.id} is good until {ended.expires_at:%Y-%m-%d %H:%M:%S} UTC."])
        case "revoke":
            record = revoke_key(args.id)
            print(json.dumps({"revoked": record.id}) if args.json else f"revoked {record.id} of {record.tenant}")
            return 0
        case "hash":
            num = hash_plain_keys()
            print(json.dumps({"hashed": num}) if args.json else f"{num} keys in {keys_file()} were replaced by their hashes.")
            return 0
        case unknown:
            raise AssertionError(unknown)


def _show_new(key: str, record: KeyRecord, args: argparse.Namespace, said: list[str]) -> int:
    if args.save:
        save_client_key(key)
    if args.json:
        print(json.dumps({"key": key} | _facts(record)))
        return 0
    print(key)
    # On stderr, so that KEY=$(adaptfleet keys add acme) holds the key alone.

    print("\n".join([f"{record.id} of {record.tenant}. The key is not shown again.", *said]), file=sys.stderr)
    return 0


def _list(records: list[KeyRecord], as_json: bool) -> int:
    if as_json:
        print(json.dumps([_facts(record) for record in records], indent=2))
        return 0
    print_table(
        ("id", "tenant", "models", "created", "ends", "note"),
        [
            (
                record.id,
                record.tenant,
                " ".join(record.models),
                f"{record.created_at:%Y-%m-%d %H:%M}" if record.created_at else "-",
                _ends(record),
                record.note or "-",
            )
            for record in records
        ],
    )
    return 0


def _ends(record: KeyRecord) -> str:
    if record.expires_at is None:
        return "-"
    return f"{record.expires_at:%Y-%m-%d %H:%M}" + (" (expired)" if record.expires_at <= datetime.now(UTC) else "")


def _facts(record: KeyRecord) -> dict[str, object]:
    return record.model_dump(mode="json", exclude={"sha256"})


def _end(text: str | None) -> datetime | None:
    if text is None:
        return None
    if _SPAN.fullmatch(text):
        return datetime.now(UTC).replace(microsecond=0) + _span(text)
    try:
        end = datetime.fromisoformat(text)
    except ValueError:
        raise ContractError(f"--expires {text!r} is neither a time such as 2030-01-31T12:00:00+00:00 nor a span such as 30d.") from None
    end = end if end.tzinfo else end.replace(tzinfo=UTC)
    if end <= datetime.now(UTC):
        raise ContractError(f"--expires {text!r} is past.")
    return end


def _span(text: str) -> timedelta:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ContractError(f"{text!r} is no time span; write 45m, 24h or 7d.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
