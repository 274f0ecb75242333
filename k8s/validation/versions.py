"""One version of Ray, one of the images, everywhere: requirements/*.lock, pyproject.toml, operator/versions.yaml and every manifest."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache

import yaml

from k8s.validation import core_kinds, operator_settings
from k8s.validation.manifests import ROOT, Document, Finding, name_of
from k8s.validation.operator_rules import ray_cluster
from k8s.validation.pods import pods

VERSIONS = ROOT / "k8s" / "operator" / "versions.yaml"
_OURS = re.compile(r"(?:^|/)adaptfleet/(cpu|gpu)$")


@cache
def locked_ray() -> str:
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    matched = re.search(r"^ray==(\S+)$", lock, re.MULTILINE)
    assert matched, "requirements/cpu.lock names no ray"
    return matched[1]


@cache
def image_tag() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return f"{project['version']}-ray{locked_ray()}"


def pinned() -> Iterator[Finding]:
    """operator/versions.yaml against the locks and against what the validation itself is written for."""
    given = yaml.safe_load(VERSIONS.read_text(encoding="utf-8"))
    operator = operator_settings.values()["image"]["tag"]
    wanted = {"ray": locked_ray(), "image": image_tag(), "kubernetes": core_kinds.VERSION, "kuberay": operator}
    for key, value in wanted.items():
        if str(given.get(key)) != value:
            yield Finding(f"{VERSIONS.relative_to(ROOT)} {key}", f"is {given.get(key)}, and should be {value}")


def findings(document: Document) -> Iterator[Finding]:
    cluster = ray_cluster(document)
    if cluster and str(cluster[1].get("rayVersion")) != locked_ray():
        yield Finding(f"{name_of(document)} {cluster[0]}.rayVersion", f"is {cluster[1].get('rayVersion')}; the lock has {locked_ray()}")
    for pod in pods(document):
        if pod.role == "other":
            continue
        for container in pod.spec.get("containers") or []:
            name, _, tag = str(container.get("image", "")).rpartition(":")
            build = _OURS.search(name)
            if build is None:
                yield Finding(f"{pod.where}.spec.containers", f"{container.get('image')!r} is none of our images")
            elif tag != image_tag():
                yield Finding(f"{pod.where}.spec.containers", f"the image's tag is {tag}; lock and version make it {image_tag()}")
            limits = (container.get("resources") or {}).get("limits") or {}
            if build and (build[1] == "gpu") < bool(limits.get("nvidia.com/gpu")) and not _declares_only(pod.owner):
                yield Finding(f"{pod.where}.spec.containers", "wants an accelerator, but its image is the CPU build")


def _declares_only(document: Document) -> bool:
    """A small cluster may declare accelerators to try things out; a namespace that ends in -dev is one."""
    return str(document["metadata"].get("namespace", "")).endswith("-dev")
