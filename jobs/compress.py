"""Makes a smaller or faster checkpoint of a model by a recipe of steps, measures it against its parent, and publishes it.

python jobs/compress.py --config jobs/configs/compress_w8a8.yaml
ray job submit --working-dir . -- python jobs/compress.py --config jobs/configs/compress_w8a8.yaml
"""

import sys

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.program import run_job


def start(job: CompressJob) -> None:
    from adaptfleet.on_ray.compress.compression import run_compression

    print(run_compression(job))


if __name__ == "__main__":
    sys.exit(run_job(CompressJob, __doc__, start))
