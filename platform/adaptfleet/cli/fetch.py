"""Brings what is embedded here, so that later steps need no network."""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

from adaptfleet.contracts.data import EMBEDDED_DATASETS, DataSpec
from adaptfleet.contracts.home import home
from adaptfleet.contracts.model import EMBEDDED_MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*EMBEDDED_MODELS, *EMBEDDED_DATASETS))}; none: all")


def run(args: argparse.Namespace) -> int:
    from adaptfleet.contracts.errors import ContractError
    from adaptfleet.contracts.names import near

    known = (*EMBEDDED_MODELS, *EMBEDDED_DATASETS)
    unknown = [f"{name!r} is not embedded.{near(name, known)}" for name in args.names if name not in known]
    if unknown:
        raise ContractError(f"{' '.join(unknown)} Allowed: {', '.join(known)}.")
    fetch(args.names or known)
    return 0


def fetch(names: tuple[str, ...] | list[str]) -> None:
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.models.embedded import embedded_model

    def bring(name: str) -> None:
        started = time.monotonic()
        if name in EMBEDDED_MODELS:
            size = sum(file.stat().st_size for file in embedded_model(name).iterdir())
            what = f"model, {size / 1e6:.0f} MB"
        else:
            data = load_dataset(DataSpec(train=name))
            what = f"data set, {len(data.train)} rows to train on, {len(data.test)} held out"
        print(f"{name}: {what} ({time.monotonic() - started:.1f} s)", flush=True)

    # Nearly all of it is waiting for pip.
    with ThreadPoolExecutor(len(names)) as pool:
        for _ in pool.map(bring, names):
            pass
    print(f"in {home()}")
