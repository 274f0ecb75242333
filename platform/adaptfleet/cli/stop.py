"""Stops the local cluster that `serve` started, or that a quickstart left, and nothing else."""

import argparse

from adaptfleet.contracts.home import home


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The cluster is found by local-cluster.json in ADAPTFLEET_HOME; clusters of other homes, and any other Ray, are left alone."
    )


def run(args: argparse.Namespace) -> int:
    from adaptfleet.on_ray.cluster.record import default_record
    from adaptfleet.on_ray.local_cluster import LocalCluster

    if LocalCluster.clear(default_record(), logs_to=home() / "logs"):
        print(f"stopped. Ray's logs: {home() / 'logs' / 'ray'}")
    else:
        print(f"nothing to stop: no local cluster of {home()} is running.")
    return 0
