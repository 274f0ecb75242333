"""`adaptfleet top`: the endpoint's engine, models and tenants, drawn anew every few seconds; once and plain where it is piped."""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adaptfleet.cli.tables import print_table
from adaptfleet.contracts.errors import ServingError

_MODELS = (
    ("model", "id"),
    ("kind", "kind"),
    ("traffic", "traffic"),
    ("requests", "requests"),
    ("errors", "errors"),
    ("tokens out", "output_tokens"),
)
_TENANTS = (
    ("tenant", "tenant"),
    ("class", "priority"),
    ("in flight", "in_flight"),
    ("requests today", "requests_today"),
    ("tokens today", "tokens_today"),
    ("tokens this month", "tokens_this_month"),
    ("limits", "limits"),
)
_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the endpoint, without /v1 (default: %(default)s)")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)g)")
    parser.add_argument("--once", action="store_true", help="look once")
    parser.add_argument("--json", action="store_true", help="print what the endpoint says, once, as JSON")


def run(args: argparse.Namespace) -> int:
    key = os.environ.get("OPENAI_API_KEY") or _own_key()
    status = look(args.url, key)
    if args.json:
        print(json.dumps(status, indent=2))
        return 0
    if args.once or not sys.stdout.isatty():
        _print_plain(status)
        return 0
    with Live(_drawn(args.url, status), console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(max(0.2, args.every))
            try:
                drawn = _drawn(args.url, look(args.url, key))
            except ServingError as error:
                drawn = Group(Text(str(error), style="red"))
            live.update(drawn, refresh=True)


def look(url: str, key: str) -> dict[str, Any]:
    """What `/status` says. ServingError where it says nothing."""
    request = urllib.request.Request(f"{url.rstrip('/')}/status", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            status: dict[str, Any] = json.load(reply)
            return status
    except urllib.error.HTTPError as error:
        raise ServingError(f"{url} answered {error.code}: {_message(error)}") from None
    except (OSError, ValueError) as error:
        raise ServingError(f"{url} does not answer: {error}. Is it up? `adaptfleet serve` starts it; --url names another.") from None


def _own_key() -> str:
    from adaptfleet.on_ray.serve.key_file import VARIABLE, client_key_file, first_key

    # Looking at an endpoint is no reason to make keys.
    return first_key() if os.environ.get(VARIABLE) or client_key_file().exists() else "none"


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


def _print_plain(status: dict[str, Any]) -> None:
    for base in _bases(status):
        if base["engine"]:
            print_table((f"engine of {base['base']}", "now"), [(name, f"{value:g}") for name, value in base["engine"].items()])
    for columns, rows in ((_MODELS, status["models"]), (_TENANTS, status["tenants"])):
        print_table([name for name, _ in columns], [[str(row[key]) or "-" for _, key in columns] for row in rows])


def _bases(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an endpoint from before there could be several, its one."""
    return list(status.get("bases") or [status])


def _drawn(url: str, status: dict[str, Any]) -> Group:
    parts: list[Any] = [Text(f"{url}  {time.strftime('%H:%M:%S')}", style="bold")]
    for base in _bases(status):
        engine = "  ".join(f"{name} {value:g}" for name, value in base["engine"].items())
        parts.append(Text(f"{base['base']}  replica {base['replica'] or '-'}  {engine}"))
    busiest = sorted(status["models"], key=lambda row: -row["requests"])
    for columns, rows in ((_MODELS, busiest[:30]), (_TENANTS, status["tenants"][:30])):
        table = Table(header_style="bold", expand=True)
        for name, key in columns:
            table.add_column(name, justify="right" if rows and isinstance(rows[0][key], int) else "left")
        for row in rows:
            table.add_row(*(Text(f"{row[key]:,}" if isinstance(row[key], int) else str(row[key])) for _, key in columns))
        parts.append(table)
    return Group(*parts)
