"""`adaptfleet models`: what is published, and what its names mean."""

import argparse
import json
import sys
from typing import get_args

from adaptfleet.cli.tables import print_table
from adaptfleet.contracts.artifacts import ArtifactKind, Manifest
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.evaluating import EvaluationRecord
from adaptfleet.contracts.names import DEFAULT_ALIAS, Reference
from adaptfleet.store.gate import Requirement, check_requirements
from adaptfleet.store.index import Listing
from adaptfleet.store.lineage import Ancestry, ancestry
from adaptfleet.store.records import AliasSplit
from adaptfleet.store.registry import Registry
from adaptfleet.store.sweep_points import is_point, version_of_point

_REFERENCE = "NAME (its alias prod), NAME@3 (version 3) or NAME@canary (an alias)"
_EPILOG = """\
A version never changes; an alias is moved. `NAME` alone means the alias prod of it, on the command line and on the endpoint.

  adaptfleet models list --kind adapter
  adaptfleet models show address-json@2
  adaptfleet models promote address-json@2               prod points to version 2
  adaptfleet models promote address-json@canary          prod points to where canary points
  adaptfleet models promote address-json@3 --alias canary
  adaptfleet models promote address-json@3 --require 'exact_match>=0.8' --require 'perplexity<1.2'
  adaptfleet models promote sweep/address-joint#rank8-ratio0-bits8   prod of the finalists' name points to this point of a sweep
  adaptfleet models rollback address-json                prod returns to where it pointed before
  adaptfleet models split address-json 3=95 4=5          a canary: version 4 for five users of a hundred
  adaptfleet models rollback address-json                ... taken back
  adaptfleet models rm address-json@1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--store", metavar="URL", help="the store (file://, s3://, gs://, az://), instead of ADAPTFLEET_STORE")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)

    listing = actions.add_parser("list", help="every published name, its latest version and its aliases")
    listing.add_argument("--kind", choices=get_args(ArtifactKind), help="only this kind")
    show = actions.add_parser("show", help="one version: its files, base, metrics, evaluations and what it was made from")
    show.add_argument("reference", help=_REFERENCE)
    promote = actions.add_parser("promote", help="point an alias at a version; served from the next request on, with no restart")
    promote.add_argument(
        "reference",
        metavar="NAME@VERSION",
        help="the version that the alias shall mean: NAME@3, NAME@canary, or a point of a sweep, sweep/NAME#POINT",
    )
    promote.add_argument("--alias", default=DEFAULT_ALIAS, help="the alias to move (default: %(default)s)")
    promote.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="'METRIC>=NUMBER'",
        help="move it only if the version's newest evaluation, or else its manifest, says so (>=, >, <=, <); may be repeated",
    )
    rollback = actions.add_parser("rollback", help="return an alias to where it pointed before")
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("--alias", default=DEFAULT_ALIAS, help="the alias to return (default: %(default)s)")
    remove = actions.add_parser("rm", help="remove a version to which no alias points, or a whole name")
    remove.add_argument("reference", metavar="NAME[@VERSION]", help="NAME@3 removes version 3; NAME removes all its versions and aliases")
    remove.add_argument("--yes", action="store_true", help="do not ask before a whole name is removed")
    split = actions.add_parser("split", help="let an alias mean several versions by weight (a canary), or give it a shadow")
    split.add_argument("name", metavar="NAME")
    split.add_argument(
        "shares", nargs="*", metavar="VERSION=WEIGHT", help="3=95 4=5: of every hundred users five get version 4, always the same"
    )
    split.add_argument("--alias", default=DEFAULT_ALIAS, help="the alias to split (default: %(default)s)")
    split.add_argument("--shadow", type=int, metavar="VERSION", help="a version that gets copies of requests; its answers go nowhere")
    split.add_argument("--shadow-percent", type=float, default=100.0, metavar="PERCENT", help="how many are copied (default: %(default)g)")
    for action in (listing, show, promote, rollback, remove, split):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    registry = Registry.open(args.store)
    match args.action:
        case "list":
            return _list(registry, args.kind, args.json)
        case "show":
            return _show(registry, args.reference, args.json)
        case "promote":
            return _promote(registry, args.reference, args.alias, args.require, args.json)
        case "rollback":
            manifest = registry.rollback(args.name, args.alias)
            return _moved(args.name, args.alias, manifest.version, args.json)
        case "split":
            return _split(registry, args)
        case "rm":
            return _remove(registry, args.reference, args.yes, args.json)
        case unknown:
            raise AssertionError(unknown)


def _list(registry: Registry, kind: ArtifactKind | None, as_json: bool) -> int:
    rows = []
    for name, listing in registry.snapshot().items():
        latest = registry.manifest(name, listing.versions[-1])
        if kind is None or latest.kind == kind:
            rows.append((latest, listing))
    if as_json:
        print(
            json.dumps(
                [
                    {"name": m.name, "kind": m.kind, "base": m.base, "versions": listing.versions, "aliases": dict(listing.aliases)}
                    | {"splits": {alias: s.model_dump(mode="json", include={"shares", "shadow"}) for alias, s in listing.splits.items()}}
                    | {"metrics": m.metrics, "created_at": m.created_at.isoformat()}
                    for m, listing in rows
                ],
                indent=2,
            )
        )
        return 0
    if not rows:
        print(f"Nothing {f'of the kind {kind} ' if kind else ''}is published in {registry.url}.", file=sys.stderr)
        return 0
    print_table(
        ("name", "kind", "latest", "aliases", "base", "method", "metrics", "created"),
        [
            (
                m.name,
                m.kind,
                str(m.version),
                _aliases(listing),
                m.base or "-",
                _method(m),
                _metrics(m),
                f"{m.created_at:%Y-%m-%d %H:%M}",
            )
            for m, listing in rows
        ],
    )
    return 0


def _show(registry: Registry, reference: str, as_json: bool) -> int:
    manifest = registry.resolve(reference)
    pointing = [alias for alias, version in registry.aliases(manifest.name).items() if version == manifest.version]
    family = ancestry(registry, manifest.reference)
    evaluations = registry.evaluations(manifest.reference)
    if as_json:
        beside = {"aliases": pointing, "lineage": _as_json(family), "evaluations": [e.model_dump(mode="json") for e in evaluations]}
        print(json.dumps(manifest.model_dump(mode="json") | beside, indent=2))
        return 0
    facts = [
        ("artifact", manifest.reference),
        ("kind", manifest.kind),
        ("aliases", ", ".join(pointing) or "-"),
        ("base", manifest.base or "-"),
        ("base revision", manifest.base_revision or "-"),
        ("method", json.dumps(manifest.method) if manifest.method else "-"),
        ("metrics", _metrics(manifest)),
        ("contract", manifest.contract_fingerprint or "-"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()) or "-"),
        ("created", manifest.created_at.isoformat(timespec="seconds")),
    ]
    print_table(("field", "value"), facts)
    print_table(("file", "bytes", "sha256"), [(path, str(entry.num_bytes), entry.sha256) for path, entry in sorted(manifest.files.items())])
    if evaluations:
        print_table(
            ("evaluated", "data", "rows", "metrics, 95% interval"),
            [(f"{e.evaluated_at:%Y-%m-%d %H:%M}", e.data, str(e.num_rows), _estimates(e)) for e in evaluations],
        )
    if family.parents:
        print("made from")
        _print_parents(family, "  ")
    return 0


def _promote(registry: Registry, reference: str, alias: str, required: list[str], as_json: bool) -> int:
    requirements = [Requirement.parse(text) for text in required]
    if is_point(reference):
        reference = version_of_point(registry, reference).reference
    if "@" not in reference:
        known = ", ".join(f"{reference}@{version}" for version in registry.versions(reference)[-5:])
        raise ContractError(
            f"{reference!r} names no version to promote. Write {reference}@VERSION; "
            + (f"there is {known}." if known else "nothing is published under this name.")
        )
    manifest = registry.resolve(reference)
    check_requirements(registry, manifest, requirements)
    registry.set_alias(manifest.name, alias, manifest.version)
    return _moved(manifest.name, alias, manifest.version, as_json)


def _split(registry: Registry, args: argparse.Namespace) -> int:
    weights: dict[int, float] = {}
    wrong = []
    for text in args.shares:
        version, equals, weight = text.partition("=")
        try:
            if not equals or int(version) in weights:
                raise ValueError
            weights[int(version)] = float(weight)
        except ValueError:
            wrong.append(repr(text))
    if wrong:
        raise ContractError(f"{', '.join(wrong)}: a share is VERSION=WEIGHT, each version once, such as 3=95 4=5.")
    made = registry.split(args.name, weights, args.alias, args.shadow, args.shadow_percent)
    if args.json:
        print(json.dumps({"name": args.name, "alias": args.alias} | made.model_dump(mode="json", include={"shares", "shadow"})))
        return 0
    print(f"{args.name}@{args.alias} -> {_split_text(made) or 'its own version'}")
    return 0


def _split_text(split: AliasSplit) -> str:
    total = sum(share.weight for share in split.shares)
    parts = [f"version {share.version}: {100 * share.weight / total:.4g}%" for share in split.shares]
    return ", ".join(parts + ([f"shadow version {split.shadow.version}: {split.shadow.weight:.4g}%"] if split.shadow else []))


def _aliases(listing: Listing) -> str:
    shown = []
    for alias, version in listing.aliases.items():
        split = listing.splits.get(alias)
        shown.append(f"{alias}={version}" + (f" ({_split_text(split)})" if split else ""))
    return ", ".join(shown) or "-"


def _remove(registry: Registry, reference: str, yes: bool, as_json: bool) -> int:
    wanted = Reference.parse(reference)
    if "@" not in reference:
        versions = registry.versions(wanted.name)
        if versions and not yes:
            if not sys.stdin.isatty():
                raise ContractError(f"{wanted.name} has {len(versions)} versions, and all would be removed. Add --yes, or name a version.")
            if input(f"Remove {wanted.name} with all its versions ({', '.join(map(str, versions))})? [y/N] ").strip().lower() != "y":
                print("Nothing was removed.")
                return 0
        registry.remove(wanted.name)
    elif wanted.version is None:
        raise ContractError(f"{reference!r} is an alias. Name the version to remove, such as {wanted.name}@1.")
    else:
        registry.remove(wanted.name, wanted.version)
    print(json.dumps({"removed": reference}) if as_json else f"removed {reference}")
    return 0


def _moved(name: str, alias: str, version: int, as_json: bool) -> int:
    print(json.dumps({"name": name, "alias": alias, "version": version}) if as_json else f"{name}@{alias} -> {name}@{version}")
    return 0


def _method(manifest: Manifest) -> str:
    if not manifest.method:
        return "-"
    rank = manifest.method.get("rank")
    return str(manifest.method.get("kind", "-")) + (f" r={rank}" if rank is not None else "")


def _metrics(manifest: Manifest) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items()) or "-"


def _estimates(record: EvaluationRecord) -> str:
    return ", ".join(f"{name} {m.value:.4g} [{m.low:.4g}, {m.high:.4g}]" for name, m in record.metrics.items())


def _print_parents(family: Ancestry, indent: str) -> None:
    for parent in family.parents:
        print(f"{indent}{parent.reference}" + (f" ({parent.manifest.kind})" if parent.manifest else " (not in this registry)"))
        _print_parents(parent, indent + "  ")


def _as_json(family: Ancestry) -> dict[str, object]:
    return {"reference": family.reference, "published": family.manifest is not None, "parents": [_as_json(p) for p in family.parents]}
