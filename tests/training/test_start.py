"""A worker's start: it imports no more than its method needs, and nothing in its process takes turns before the training."""

import importlib.util
import subprocess
import sys
from pathlib import Path

_SHOWN = """
import sys
from adaptfleet.on_ray.train.start import imported
light = "torch" not in sys.modules
train = imported(needs_bitsandbytes=False)
import peft
print(light, train.__name__, peft.import_utils.is_bnb_available(), "torch._inductor.compile_fx" in sys.modules)
"""

_SCHEDULED = """
import os, threading
from adaptfleet.on_ray.train.start import put_other_threads_behind

ended = threading.Event()
other = threading.Thread(target=ended.wait)
other.start()

def train():
    put_other_threads_behind()
    helper = threading.Thread(target=ended.wait)
    helper.start()
    print(*(os.sched_getscheduler(thread.native_id) for thread in (threading.current_thread(), helper, threading.main_thread(), other)))

training = threading.Thread(target=train)
training.start()
training.join()
ended.set()
"""


def test_a_worker_without_four_bits_leaves_bitsandbytes_and_the_compiler_out() -> None:
    shown = subprocess.run([sys.executable, "-c", _SHOWN], capture_output=True, text=True, timeout=120, check=False)
    assert shown.stdout.split() == ["True", "train", "False", "False"], shown.stderr[-2000:]


def test_peft_still_imports_bitsandbytes_by_itself() -> None:
    """When this fails the shim in `on_ray/train/start.py` can go."""
    peft = importlib.util.find_spec("peft")
    assert peft is not None and peft.origin is not None
    at_import = (Path(peft.origin).parent / "helpers.py").read_text().partition("\ndef ")[0]
    assert "import bitsandbytes" in at_import


def test_threads_that_were_there_stay_behind_the_one_that_trains() -> None:
    """Linux's numbers: 0 is SCHED_OTHER, 3 is SCHED_BATCH."""
    done = subprocess.run([sys.executable, "-c", _SCHEDULED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "3", "3"]
