"""`adaptfleet`: the commands of the house. Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`.

Only the command that is run is imported, so that a listing costs no framework's start.
"""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence

from adaptfleet.contracts.errors import AdaptfleetError

COMMANDS: dict[str, str] = {
    "doctor": "what this machine can do, what will be slow, and what to mend",
    "quickstart": "from nothing to a live endpoint: fine-tune two adapters, serve them, compare them with the base",
    "fetch": "bring the embedded model and data sets here",
    "validate": "what a fine-tune's data are like, and all that is wrong with them",
    "submit": "run a job of jobs/ on a Ray cluster",
    "publish": "publish a folder that was made elsewhere: an adapter, a model or a data set",
    "models": "what is published: list, show, promote, rollback, rm",
    "promote": "point an alias at a version (short for `models promote`)",
    "rollback": "return an alias to where it pointed before (short for `models rollback`)",
    "top": "the endpoint's engine, models and tenants, live in a terminal",
    "keys": "API keys of tenants: add, list, rotate, revoke",
    "tenants": "what tenants.yaml gives each tenant, and all that is wrong with it",
    "serve": "run the OpenAI-compatible endpoint here",
    "stop": "stop what `serve` started, and nothing else",
    "dev": "an elastic cluster on this machine from Kubernetes manifests: up, status, apply, lose, down",
}
_SHORT = {"promote": ["models", "promote"], "rollback": ["models", "rollback"]}
_FORMATTER = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=16)
_EPILOG = """\
The usual road:
  adaptfleet doctor                                      is this machine fit?
  python jobs/finetune.py --config jobs/configs/finetune_address.yaml
  python jobs/evaluate.py --config jobs/configs/evaluate_address.yaml
  adaptfleet models list                                 what was published
  adaptfleet promote address-json@2                      `address-json` means version 2 from now on
  adaptfleet rollback address-json                       ... and no longer
  adaptfleet serve                                       base and adapters behind one endpoint

ADAPTFLEET_HOME (default ~/.adaptfleet) is where all is kept; ADAPTFLEET_STORE (file://, s3://, gs:// or az://) moves the store elsewhere.
`adaptfleet COMMAND --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 with a message on stderr for whatever a user can mend; 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in words if not word.startswith("-")), None)
    if wanted in _SHORT:
        position = words.index(wanted)
        words[position : position + 1] = _SHORT[wanted]
        wanted = _SHORT[wanted][0]
    parser = _parser(wanted)
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except AdaptfleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """All commands by name and purpose; the arguments of the wanted one alone."""
    parser = argparse.ArgumentParser(
        prog="adaptfleet",
        description="Fine-tune, publish and serve many adapters beside one base model.",
        epilog=_EPILOG,
        formatter_class=_FORMATTER,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", formatter_class=_FORMATTER)
        if name == wanted:
            module = importlib.import_module(f"adaptfleet.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
