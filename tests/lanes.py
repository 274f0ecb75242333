"""Runs the tests that an expression of markers selects, in two lanes side by side.

    python tests/lanes.py "not slow and not gpu" [--junit FOLDER]

What runs a cluster goes one after the other through one lane, so that clusters are shared and never compete; everything else goes through
the other. The second lane's output follows the first's. Ends with the first failing lane's status.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LANES = ("clusters", "not clusters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("markers", help="as for pytest -m")
    parser.add_argument("--junit", type=Path, help="a folder for each lane's JUnit file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        lanes = []
        for number, lane in enumerate(LANES):
            command = [sys.executable, "-m", "pytest", "-m", f"({arguments.markers}) and {lane}"]
            if arguments.junit:
                command.append(f"--junitxml={arguments.junit / f'lane-{number}.xml'}")
            output = stack.enter_context(tempfile.TemporaryFile()) if number else None
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT if number else None)
            stack.callback(ended, process)
            lanes.append((process, output))
        statuses = []
        for process, output in lanes:
            statuses.append(process.wait())
            if output:
                output.seek(0)
                sys.stdout.flush()
                sys.stdout.buffer.write(output.read())
    failed = [status for status in statuses if status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)]
    sys.exit(failed[0] if failed else min(statuses))  # one lane may be without tests, not both


def ended(process: subprocess.Popen[bytes]) -> None:
    """Interrupted, with time for the end of what its tests started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(50)
        process.kill()


if __name__ == "__main__":
    main()
