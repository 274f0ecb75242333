"""What every program in `jobs/` does before it imports anything heavy: arguments, contract, errors."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.contracts.loading import load_contract

S = TypeVar("S", bound=Spec)


def run_job(kind: type[S], purpose: str, start: Callable[[S], None], argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with a message for whatever a user can mend. `start` imports what the job needs and runs it."""
    parser = argparse.ArgumentParser(
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key of the contract can be overridden: --set train.epochs=2 --set 'method.targets=[q_proj, v_proj]'",
    )
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the contract")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key; may be given several times")
    parser.add_argument("--dry-run", action="store_true", help="check the contract, print it with all its defaults as JSON, and stop")
    arguments = parser.parse_args(argv)
    try:
        job = load_contract(kind, arguments.config, arguments.set)
        if arguments.dry_run:
            print(json.dumps(job.model_dump(mode="json"), indent=2))  # noqa: T201  the contract is this program's output
            return 0
        logging.basicConfig(level=os.environ.get("ADAPTFLEET_LOG", "INFO"), format="%(message)s", stream=sys.stdout)
        start(job)
    except AdaptfleetError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0
