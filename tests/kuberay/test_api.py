"""A bed with nothing on it: who may ask, what is refused, what kubectl sees. No Ray is started."""

import json
import os
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from adaptfleet.contracts.errors import AdaptfleetError, ContractError
from adaptfleet.on_ray.cluster.processes import members, wait_gone
from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def bed() -> Iterator[DevCluster]:
    with DevCluster.start(HERE) as dev:
        yield dev


def test_without_the_clients_certificate_nothing_is_said(bed: DevCluster) -> None:
    url = json.loads((bed.folder / "api.json").read_text())["url"]
    context = ssl.create_default_context(cafile=str(bed.folder / "ca.crt"))
    with pytest.raises((ssl.SSLError, OSError)):
        urllib.request.urlopen(f"{url}/api/v1/pods", context=context, timeout=10).read()
    for name in ("token", "client.key", "server.key"):
        assert (bed.folder / name).stat().st_mode & 0o777 == 0o600


def test_what_is_wrong_is_refused_and_not_kept(bed: DevCluster) -> None:
    pool = yaml.safe_load((HERE / "pool.yaml").read_text())
    pool["spec"]["autoscalerOptions"]["version"] = "v1"
    with pytest.raises(ContractError, match="v1"):
        bed.apply([pool])
    assert bed.kube.get("RayCluster", "pool") is None
    with pytest.raises(AdaptfleetError, match="404"):
        bed.kube.patch("RayCluster", "../pods", {})


def test_a_pod_that_names_a_missing_map_says_so(bed: DevCluster) -> None:
    pool = yaml.safe_load((HERE / "pool.yaml").read_text())
    pool["metadata"]["name"] = "waits"
    pool["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["envFrom"] = [{"configMapRef": {"name": "absent"}}]
    bed.apply([pool])
    with pytest.raises(AdaptfleetError, match="CreateContainerConfigError: configmaps 'absent' not found"):
        bed.ready("waits", timeout_s=2)
    bed.kube.delete("RayCluster", "waits")
    bed.kube.wait(lambda: not bed.kube.listed("Pod"), "the end of its pods", 20)


def test_kubectl(bed: DevCluster) -> None:
    def kubectl(*words: str, given: str | None = None) -> str:
        path = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"
        env = {**os.environ, "PATH": path, "KUBECONFIG": str(bed.kubeconfig), "HOME": str(bed.folder)}
        command = [shutil.which("kubectl", path=path) or "kubectl", *words]
        done = subprocess.run(command, env=env, input=given, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"a": "b"}}
    kubectl("create", "--validate=false", "-f", "-", given=yaml.safe_dump(secret))
    assert "keys" in kubectl("get", "secrets")
    kubectl("delete", "secret", "keys", "--wait=false")
    assert bed.kube.listed("Secret") == []


def test_it_ends_with_its_owner_and_leaves_nothing() -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom adaptfleet.on_ray.kuberay.dev_cluster import DevCluster\n"
        "dev = DevCluster.start(Path('/'))\nprint(dev.marker, flush=True)\ntime.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    inside = members(None, owner.stdout.readline().strip())
    owner.kill()
    owner.wait()
    assert inside and not wait_gone(inside, 30)
