"""Publishes a folder that was made elsewhere: an adapter, a model or a data set.

python jobs/publish.py --config jobs/configs/publish_adapter.yaml --set folder=/data/my-adapter --set name=my-adapter
ray job submit --working-dir . -- python jobs/publish.py --config jobs/configs/publish_adapter.yaml --set folder=/shared/my-adapter
"""

import sys

from adaptfleet.contracts.program import run_job
from adaptfleet.contracts.publishing import PublishJob


def start(job: PublishJob) -> None:
    from adaptfleet.cli.publish import publish_folder

    print(publish_folder(job).reference)


if __name__ == "__main__":
    sys.exit(run_job(PublishJob, __doc__, start))
