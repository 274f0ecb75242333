"""`adaptfleet validate`: what the data of a training job are like, and all that is wrong with them, before anything is trained."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import DistillJob, FinetuneJob
from adaptfleet.contracts.loading import job_named, load_contract

if TYPE_CHECKING:
    from adaptfleet.core.data.validation import Validation

_EPILOG = """\
  adaptfleet validate --config jobs/configs/finetune_address.yaml
  adaptfleet validate --config my.yaml --set data.train=s3://bucket/chats --html report.html

Exit status 0: it can be trained on. 2: it cannot, and why is listed."""
_BAR_CHARS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the contract of the fine-tune or distillation")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key; may be given several times")
    parser.add_argument("--html", metavar="FILE", help="write the same as a page too; it needs no other file")


def run(args: argparse.Namespace) -> int:
    job = load_contract(DistillJob if job_named(args.config) == "distill" else FinetuneJob, args.config, args.set)
    validation = validate_job(job)
    _print(validation)
    if args.html:
        from adaptfleet.cli.validation_page import page

        try:
            Path(args.html).write_text(page(validation, args.config), encoding="utf-8")
        except OSError as error:
            raise ContractError(f"cannot write {args.html}: {error.strerror}.") from None
        print(f"\nwritten to {args.html}")
    return 0 if validation.is_trainable else 2


def validate_job(job: FinetuneJob) -> "Validation":
    """The data of a job, tokenised as the job would; imports torch."""
    from adaptfleet.contracts.home import home
    from adaptfleet.core.data.token_cache import Encoder
    from adaptfleet.core.data.validation import validate
    from adaptfleet.core.models.loading import load_tokenizer, resolve_model_folder
    from adaptfleet.on_ray.published_models import at_hand
    from adaptfleet.store.registry import Registry

    def fetch(reference: str) -> Path:
        registry = Registry.open()
        return registry.fetch(registry.resolve(reference), home() / "cache" / "artifacts")

    tokenizer = load_tokenizer(resolve_model_folder(at_hand(job.model)), job.model.trust_remote_code)
    return validate(job.data, Encoder(tokenizer, job.train.pack_tokens, job.train.truncate), fetch)


def _print(validation: "Validation") -> None:
    from adaptfleet.cli.tables import print_table
    from adaptfleet.core.data.validation import statistics

    print_table(("", *(side.name for side in validation.sides)), statistics(validation))
    for side in validation.sides:
        bins = side.histogram()
        if not bins:
            continue
        print(f"\ntokens of a row, {side.name}")
        most = max(bar.count for bar in bins)
        for bar in bins:
            drawn = "█" * round(_BAR_CHARS * bar.count / most)
            print(f"  {bar.first:>7,} to {bar.last:>7,}  {bar.count:>9,}  {drawn}".rstrip())
    for finding in sorted(validation.findings, key=lambda f: not f.is_fatal):
        print(f"\n{'ERROR' if finding.is_fatal else 'note'}: {finding.title}")
        for line in finding.lines:
            print(f"  {line}")
    print("\nThis can be trained on." if validation.is_trainable else "\nThis cannot be trained on as it is.")
