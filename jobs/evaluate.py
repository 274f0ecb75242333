"""Scores adapters, models, folders and endpoints on held-out rows, and compares them.

python jobs/evaluate.py --config jobs/configs/evaluate_address.yaml --set 'subjects=[base, address-json@2]'
ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/configs/evaluate_address.yaml
"""

import sys

from adaptfleet.contracts.evaluating import EvaluateJob
from adaptfleet.contracts.program import run_job


def start(job: EvaluateJob) -> None:
    from adaptfleet.cli.evaluation_tables import print_outcome
    from adaptfleet.on_ray.evaluate.evaluation import run_evaluation

    print_outcome(run_evaluation(job))


if __name__ == "__main__":
    sys.exit(run_job(EvaluateJob, __doc__, start))
