"""The doctor: what it finds on this machine, what it makes of other machines, and its exit status."""

import json
import socket
from pathlib import Path

import pytest

from adaptfleet.cli import doctor, main
from adaptfleet.cli.doctor import Finding, cgroup_cpus, cpu_finding
from adaptfleet.on_ray.cluster import ingress

FLAGS = "processor : 0\nflags\t\t: fpu sse2 {}\n"


def test_it_examines_this_machine(fresh_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == int(any(finding["verdict"] == "impossible" for finding in findings))
    named = {finding["what"]: finding for finding in findings}
    assert set(named) >= {"Python", "cores", "memory", "accelerator", "C++ compiler", "packages", "ADAPTFLEET_HOME", "port"}
    assert named["Python"]["value"].startswith("3.11")
    assert named["ADAPTFLEET_HOME"]["value"] == f"{fresh_home}, writable"


def test_everything_that_is_not_ok_says_what_to_do(fresh_home: Path) -> None:
    assert all(finding.advice for finding in doctor.examine(8000) if finding.verdict != "ok")


@pytest.mark.parametrize(
    ("flags", "verdict", "said"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "ok", "AMX"),
        ("avx2 avx512f avx512_bf16", "ok", "AVX512-BF16"),
        ("avx2 avx512f", "slow", "float32"),
        ("avx2", "slow", "AVX2"),
    ],
)
def test_what_a_cpu_can_do(flags: str, verdict: str, said: str) -> None:
    finding = cpu_finding(FLAGS.format(flags))
    assert finding.verdict == verdict
    assert said in finding.value
    assert bool(finding.advice) == (verdict != "ok")


def test_a_cpu_without_avx2_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert cpu_finding(FLAGS.format("")).verdict == "impossible"


@pytest.mark.parametrize(("text", "limit"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("nonsense", None)])
def test_a_containers_limit_is_read(tmp_path: Path, text: str, limit: float | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert cgroup_cpus(file) == limit
    assert cgroup_cpus(tmp_path / "absent") is None


def test_a_port_in_use_is_told(fresh_home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = doctor.port_free(taken.getsockname()[1])
    assert finding.verdict == "slow" and "--port" in finding.advice


def test_a_home_that_cannot_be_written_is_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setenv("ADAPTFLEET_HOME", str(occupied / "home"))
    assert doctor.home_folder().verdict == "impossible"
    assert main(["doctor"]) == 1
    assert "impossible here: ADAPTFLEET_HOME" in capsys.readouterr().out


def test_few_open_files_are_slow_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "files_allowed", lambda: 1024)
    finding = doctor.open_files()
    assert finding.verdict == "slow" and "1,024" in finding.value and "ulimit" in finding.advice


def test_only_the_impossible_fails(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda port: [Finding("cores", "1", "slow", "more")])
    assert main(["doctor"]) == 0


def test_a_package_that_differs_from_the_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text("# a lock\npydantic==0.0.1\nno-such-package==1.0\n")
    monkeypatch.setattr(doctor, "_lock_file", lambda: lock)
    finding = doctor.versions()
    assert finding.verdict == "slow"
    assert "pydantic" in finding.advice and "no-such-package missing" in finding.advice and "make setup" in finding.advice
