"""Distils a teacher into a student and publishes the student.

python jobs/distill.py --config jobs/configs/distill_address.yaml
ray job submit --working-dir . -- python jobs/distill.py --config jobs/configs/distill_address.yaml
"""

import sys

from adaptfleet.contracts.jobs import DistillJob
from adaptfleet.contracts.program import run_job


def start(job: DistillJob) -> None:
    from adaptfleet.on_ray.train.finetune import run_finetune

    print(run_finetune(job))


if __name__ == "__main__":
    sys.exit(run_job(DistillJob, __doc__, start))
