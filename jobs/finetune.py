"""Fine-tunes a model and publishes the result.

python jobs/finetune.py --config jobs/configs/finetune_address.yaml
ray job submit --working-dir . -- python jobs/finetune.py --config jobs/configs/finetune_address.yaml
"""

import sys

from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.program import run_job


def start(job: FinetuneJob) -> None:
    from adaptfleet.on_ray.train.finetune import run_finetune

    print(run_finetune(job))


if __name__ == "__main__":
    sys.exit(run_job(FinetuneJob, __doc__, start))
