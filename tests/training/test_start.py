"""A worker's start imports no more than its method needs."""

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


def test_a_worker_without_four_bits_leaves_bitsandbytes_and_the_compiler_out() -> None:
    shown = subprocess.run([sys.executable, "-c", _SHOWN], capture_output=True, text=True, timeout=120, check=False)
    assert shown.stdout.split() == ["True", "train", "False", "False"], shown.stderr[-2000:]


def test_peft_still_imports_bitsandbytes_by_itself() -> None:
    """When this fails the shim in `on_ray/train/start.py` can go."""
    peft = importlib.util.find_spec("peft")
    assert peft is not None and peft.origin is not None
    at_import = (Path(peft.origin).parent / "helpers.py").read_text().partition("\ndef ")[0]
    assert "import bitsandbytes" in at_import
