"""Alerts by promtool on series in which one thing is wrong, their runbooks, and dashboards. Without promtool its part is not collected, and
conftest.py says so; where CI is true it must be there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import yaml

from k8s import dashboards
from k8s.validation.manifests import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"
SCENES = Path(__file__).parent / "alerts.yaml"
SPEC = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))["spec"]
RULES = [rule for group in SPEC["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"] for rule in RULES if "alert" in rule}
RECORDS = {rule["record"] for rule in RULES if "record" in rule}

if shutil.which("promtool") or os.environ.get("CI") == "true":

    def test_each_alert_fires_on_its_fault_and_not_otherwise(tmp_path: Path) -> None:
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(SPEC, width=1000), encoding="utf-8")
        shutil.copy(SCENES, tmp_path)
        checked = _promtool("check", "rules", "rules.yaml", cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        tested = _promtool("test", "rules", SCENES.name, cwd=tmp_path)
        assert tested.returncode == 0, tested.stdout + tested.stderr

    def test_a_threshold_that_moved_is_noticed(tmp_path: Path) -> None:
        """The scenes are near enough to the thresholds that a changed rule fails them."""
        changed = json.loads(json.dumps(SPEC))
        moved = {"AdaptfleetServerErrors": ("> 0.02", "> 0.5"), "AdaptfleetTrainingStalled": ("== 1", ">= 0")}
        for rule in (rule for group in changed["groups"] for rule in group["rules"] if rule.get("alert") in moved):
            old, new = moved[rule["alert"]]
            assert old in rule["expr"]
            rule["expr"] = rule["expr"].replace(old, new)
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed, width=1000), encoding="utf-8")
        shutil.copy(SCENES, tmp_path)
        said = _promtool("test", "rules", SCENES.name, cwd=tmp_path).stderr
        assert all(alert in said for alert in moved), said


def _promtool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_every_alert_has_a_scene_a_runbook_and_a_summary() -> None:
    scenes = {
        test["alertname"] for scene in yaml.safe_load(SCENES.read_text(encoding="utf-8"))["tests"] for test in scene["alert_rule_test"]
    }
    sections = set(re.findall(r"^## (Adaptfleet\w+)$", (ROOT / "docs" / "runbooks.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert scenes == sections == ALERTS
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]


def test_the_dashboards_are_what_the_code_makes() -> None:
    for dashboard in dashboards.OURS:
        kept = json.loads((MONITORING / "dashboards" / f"{dashboard.uid}.json").read_text(encoding="utf-8"))
        assert kept == dashboards.grafana(dashboard), "run `python -m k8s.dashboards`"


def test_what_panels_and_alerts_ask_for_exists() -> None:
    """Each metric is one that Ray, vLLM or this project exports, or a rule records. Misspelt ones give empty panels and silent alerts."""
    known = RECORDS | _exported()
    asked = {name for rule in RULES for name in _metrics(rule["expr"])}
    asked |= {name for dashboard in dashboards.OURS for panel in dashboard.panels for query, _ in panel.queries for name in _metrics(query)}
    assert asked - known == set()


def test_rays_own_dashboards_are_made(tmp_path: Path) -> None:
    written = {file.stem for file in dashboards.write(tmp_path, with_rays=True)}
    assert {"adaptfleet-endpoint", "adaptfleet-fleet", "ray-default", "ray-serve", "ray-serve_llm", "ray-train"} <= written
    assert all(json.loads(file.read_text(encoding="utf-8"))["panels"] for file in tmp_path.glob("*.json"))


def _metrics(expression: str) -> set[str]:
    """Names of metrics in an expression: words before a brace, a bracket or an operator that are no function and no label."""
    bare = re.sub(r"\{[^}]*\}|\"[^\"]*\"|\b(by|on|without|ignoring)\s*\([^)]*\)", " ", expression)
    words = set(re.findall(r"[A-Za-z_:][\w:]*(?!\s*\()\b", bare))
    language = {"and", "or", "unless", "by", "on", "le", "Inf", "sum", "max", "avg", "count", "min"}
    return {
        word for word in words if not re.fullmatch(r"[smhd]\d*", word) and word not in language and ("_" in word or word == "up")
    } - _functions()


def _functions() -> set[str]:
    return {"histogram_quantile", "sum_over_time", "avg_over_time", "max_over_time", "absent_over_time"}


def _exported() -> set[str]:
    """From the sources of those that export them, so that an update of Ray or vLLM that renames one is noticed."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    names: set[str] = {"up", "ray_resources"}
    names |= {f"ray_{name}" for name in METRICS_GAUGES}
    # Of the autoscaler's metrics v2 sets few; the others are there and stay at nothing.
    autoscaler = (_folder_of("ray") / "autoscaler" / "v2" / "metrics_reporter.py").read_text(encoding="utf-8")
    usage = (_folder_of("ray") / "data" / "_internal" / "usage" / "collector.py").read_text(encoding="utf-8")
    engine = "".join(file.read_text(encoding="utf-8") for file in (_folder_of("vllm") / "v1" / "metrics").glob("*.py"))
    ours = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "platform").rglob("*.py"))
    scaling = (_folder_of("ray") / "serve" / "_private" / "deployment_state.py").read_text(encoding="utf-8")
    training = (ROOT / "platform/adaptfleet/on_ray/train/cluster_metrics.py").read_text(encoding="utf-8")
    bases: set[str] = {f"autoscaler_{name}" for name in re.findall(r"_prom_metrics\.([a-z_]+)", autoscaler)}
    bases |= set(re.findall(r'"(ray_node_[a-z_]+)"', usage))
    bases |= {f"ray_{name}" for name in re.findall(r'"(serve_autoscaling_[a-z_]+)"', scaling)}
    bases |= set(re.findall(r'"(vllm:[a-z_]+)"', engine)) | set(re.findall(r'"(adaptfleet_[a-z_]+)"', ours))
    bases |= {f"ray_adaptfleet_training_{name}" for name in re.findall(r'^    "([a-z_]+)": "', training, re.MULTILINE)}
    for base in bases:
        names |= {base, f"{base}_bucket", f"{base}_sum", f"{base}_count", base if base.endswith("_total") else f"{base}_total"}
    return names


def _folder_of(package: str) -> Path:
    """Without importing it: vLLM takes its time."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
