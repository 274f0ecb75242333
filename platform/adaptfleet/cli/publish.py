"""`adaptfleet publish`: publishes a folder that was made elsewhere."""

import argparse
import json
from pathlib import Path
from typing import get_args

from adaptfleet.contracts.artifacts import ArtifactKind, Draft, Manifest
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.names import DEFAULT_ALIAS
from adaptfleet.contracts.publishing import PublishJob
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.store.registry import Registry

_EPILOG = """\
  adaptfleet publish adapter ./my-adapter --name my-adapter --base smollm2-135m
  adaptfleet publish dataset ./rows --name tickets
  adaptfleet publish model ./merged --name my-model --parent my-adapter@1

An adapter is a folder by PEFT's save_pretrained: adapter_config.json and adapter_model.safetensors. It is checked before it is published:
whole, of the rank it says, and of a kind that the endpoint serves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("kind", choices=get_args(ArtifactKind))
    parser.add_argument("folder", help="the folder with the files; all of it is published")
    parser.add_argument("--name", required=True, help="the name in the registry and on the endpoint")
    parser.add_argument("--base", metavar="MODEL", help="adapters: the base, as in model.source (embedded name, folder or hub id)")
    parser.add_argument("--alias", default=DEFAULT_ALIAS, help="the alias moved to the new version (default: %(default)s)")
    parser.add_argument("--no-alias", action="store_true", help="move no alias")
    parser.add_argument("--parent", action="append", default=[], metavar="NAME@VERSION", help="what it was made from; may be repeated")


def run(args: argparse.Namespace) -> int:
    values = {"kind": args.kind, "folder": args.folder, "name": args.name, "parents": args.parent}
    values["alias"] = None if args.no_alias else args.alias
    if args.base is not None:
        values["base"] = {"source": args.base}
    manifest = publish_folder(parse_contract(PublishJob, json.dumps(values), origin="adaptfleet publish"))
    print(manifest.reference)
    return 0


def publish_folder(job: PublishJob) -> Manifest:
    """Publishes the folder by its contract. For an adapter the base's files are hashed first; that imports torch."""
    folder = Path(job.folder).expanduser()
    base, revision, method = None, None, None
    if job.base is not None:
        from adaptfleet.core.models.loading import base_revision, resolve_model_folder
        from adaptfleet.on_ray.published_models import at_hand

        method = _method(folder)
        base, revision = ServingSpec(model=job.base).base_id(), base_revision(resolve_model_folder(at_hand(job.base)))
    draft = Draft(kind=job.kind, name=job.name, base=base, base_revision=revision, method=method, parents=job.parents, metrics=job.metrics)
    return Registry.open().publish(draft, folder, job.alias)


def _method(folder: Path) -> dict[str, object]:
    """What the adapter's own config says of the method; the registry checks it against the tensors."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {"kind": "lora", "rank": config["r"], "alpha": config["lora_alpha"], "use_rslora": config.get("use_rslora", False)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{file} is no adapter's config ({error!r}). Give a folder saved by PEFT's save_pretrained.") from None
