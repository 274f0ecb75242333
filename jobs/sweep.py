"""Searches a space of jobs for the best of them, measures the finalists in the engine, publishes them, and writes a report.

python jobs/sweep.py --config jobs/configs/sweep_joint.yaml
ray job submit --working-dir . -- python jobs/sweep.py --config jobs/configs/sweep_joint.yaml
"""

import sys

from adaptfleet.contracts.program import run_job
from adaptfleet.contracts.search import SweepJob


def start(job: SweepJob) -> None:
    from adaptfleet.on_ray.tune.sweep import run_sweep

    print(run_sweep(job))


if __name__ == "__main__":
    sys.exit(run_job(SweepJob, __doc__, start))
