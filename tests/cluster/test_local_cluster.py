"""A real local cluster: what it is bound to, who may use it, that jobs run, and that its end leaves nothing and touches nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptfleet.contracts.errors import AdaptfleetError, TrainingError
from adaptfleet.on_ray.cluster import launch
from adaptfleet.on_ray.cluster.ingress import USE_HAPROXY
from adaptfleet.on_ray.cluster.processes import MARKER, ProcessId, end_cluster, members, wait_gone
from adaptfleet.on_ray.cluster.submission import ray_command
from adaptfleet.on_ray.local_cluster import LocalCluster


def _listening(pids: set[int]) -> set[str]:
    """Addresses, in /proc's hexadecimal, on which these processes listen."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(handle.readlink()))
            except FileNotFoundError:
                continue
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                addresses.add(fields[1].rpartition(":")[0])
    return addresses


def _is_loopback(address: str) -> bool:
    return address in ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def test_listens_on_loopback_only(local_cluster: LocalCluster) -> None:
    record = local_cluster._record
    addresses = _listening({process.pid for process in members(record.leader, record.marker)})
    assert addresses
    assert all(_is_loopback(address) for address in addresses), addresses


def test_wants_the_token(local_cluster: LocalCluster) -> None:
    assert (local_cluster.folder / "token").stat().st_mode & 0o777 == 0o600
    assert local_cluster.folder.stat().st_mode & 0o777 == 0o700
    command = [*ray_command(), "job", "list"]
    env = {**os.environ, **local_cluster.env}
    assert subprocess.run(command, env=env, capture_output=True, timeout=300, check=False).returncode == 0
    stranger = {**env, "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode != 0
    assert "token" in refused.stdout + refused.stderr


def test_a_job_runs_and_is_followed(local_cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text(
        "import os, ray\nray.init(log_to_driver=False)\n"
        "niceness = ray.get(ray.remote(lambda: os.nice(0)).remote())\n"
        "print('answer', os.environ['QUESTION'], niceness, ray.cluster_resources()['CPU'])\n"
    )
    lines: list[str] = []
    assert local_cluster.submit(["python", "said.py"], tmp_path, env={"QUESTION": "six by nine"}, show=lines.append) == 0
    assert "answer six by nine 0 3.0" in lines


def test_a_failed_job_raises_with_its_last_lines(local_cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("raise SystemExit('the disk is on fire')\n")
    with pytest.raises(TrainingError, match="the disk is on fire"):
        local_cluster.submit(["python", "fail.py"], tmp_path, show=lambda line: None)
    assert local_cluster.submit(["python", "fail.py"], tmp_path, show=lambda line: None, check=False) == 1


def test_its_end_leaves_nothing_and_touches_nothing_else(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """A second cluster, with a job whose processes left their session and their parent, is stopped by its record alone."""
    record_file = tmp_path / "local-cluster.json"
    job_pids = tmp_path / "pids"
    (tmp_path / "stray.py").write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(job_pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "adaptfleet-"])
    try:
        cluster = LocalCluster.start(num_cpus=1, record_file=record_file, logs_to=tmp_path / "logs")
        assert record_file.stat().st_mode & 0o777 == 0o600
        client = subprocess.Popen(
            [*ray_command(), "job", "submit", "--no-wait", "--working-dir", str(tmp_path), "--", "python", "stray.py"],
            env={**os.environ, **cluster.env},
        )
        assert client.wait(timeout=300) == 0
        end = time.monotonic() + 120
        while not (job_pids.exists() and job_pids.read_text()) and time.monotonic() < end:
            time.sleep(0.2)
        job = {ProcessId.of(int(pid)) for pid in job_pids.read_text().split()}
        assert None not in job
        attached = LocalCluster.attach(record_file)
        assert attached is not None and attached.env == cluster.env
        inside = members(cluster._record.leader, cluster._record.marker)
        assert job <= inside
        assert {process.pid for process in inside}.isdisjoint({bystander.pid, os.getpid()})
        assert LocalCluster.clear(record_file, logs_to=tmp_path / "logs")
        assert not wait_gone(inside, 0)
        assert not cluster.folder.exists() and not record_file.exists()
        assert (tmp_path / "logs" / "ray").is_dir()
        assert not LocalCluster.clear(record_file)
        cluster.stop()
    finally:
        bystander_alive = bystander.poll() is None
        bystander.kill()
        bystander.wait()
    assert bystander_alive
    assert local_cluster._record.leader.is_alive()


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    """Even when the owner is killed and can stop nothing."""
    record_file = tmp_path / "record.json"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom adaptfleet.on_ray.local_cluster import LocalCluster\n"
        "cluster = LocalCluster.start(num_cpus=1, record_file=Path(sys.argv[1]))\ntime.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(record_file)])
    end = time.monotonic() + 400
    while not record_file.exists() and owner.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    cluster = LocalCluster.attach(record_file)
    assert cluster is not None and cluster.is_owned_by_living
    inside = members(cluster._record.leader, cluster._record.marker)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    try:
        assert not wait_gone(inside, 60)
        assert LocalCluster.attach(record_file) is None
    finally:
        LocalCluster.clear(record_file)


def test_its_end_parts_this_process_from_it() -> None:
    """Ray aborts a process that is still joined a minute after its cluster's end, whatever it had to say."""
    script = (
        "import os\nfrom adaptfleet.on_ray.local_cluster import LocalCluster\n"
        "with LocalCluster.start(num_cpus=1) as cluster:\n    os.environ.update(cluster.env)\n    import ray\n    ray.init()\n"
        "raise SystemExit('still joined' if ray.is_initialized() else 'parted')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 1 and "parted" in ended.stderr, ended.stderr


def test_a_process_joins_one_cluster_after_another() -> None:
    """Each has a token of its own."""
    script = (
        "from adaptfleet.on_ray.joining import connected, joined_cluster\n"
        "for _ in range(2):\n    with joined_cluster(), connected():\n        import ray\n        print(len(ray.nodes()), 'joined')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400, check=False)
    assert ended.stdout.count("1 joined") == 2, ended.stderr


def test_no_program_imports_ray_before_it_has_a_cluster() -> None:
    """Ray reads at its import whether this machine's clusters are at its loopback address."""
    modules = ("train.finetune", "compress.compression", "tune.sweep", "evaluate.evaluation")
    imports = "; ".join(f"import adaptfleet.on_ray.{module}" for module in modules)
    script = f"import sys; {imports}; sys.exit('ray' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr


def test_where_few_files_may_be_open_haproxy_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "files_allowed", lambda: 1024)
    assert launch._cluster_env(tmp_path, "marker", {})[USE_HAPROXY] == "0"
    monkeypatch.setattr(launch, "files_allowed", lambda: 65536)
    assert launch._cluster_env(tmp_path, "marker", {})[USE_HAPROXY] == "1"


def test_a_long_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(AdaptfleetError, match="shorter"):
        LocalCluster.start(folder=tmp_path / ("long" * 20))


def test_a_reused_process_id_is_not_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        real = ProcessId.of(process.pid)
        assert real is not None
        earlier = ProcessId(process.pid, real.start_ticks - 1)
        assert not earlier.is_alive()
        assert end_cluster(earlier, "no-such-marker", grace_s=0.1) == set()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_process_that_ignores_sigterm_is_ended() -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, MARKER: "stubborn"}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert end_cluster(ProcessId.of(process.pid), "stubborn", grace_s=0.2) == set()
        assert process.wait(timeout=5) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
