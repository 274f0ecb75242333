"""Grafana's dashboards as code: ours from the panels below, Ray's from the Ray that is installed.

python -m k8s.dashboards              rewrites k8s/components/monitoring/dashboards/, which Grafana's sidecar loads
python -m k8s.dashboards FOLDER       ours and Ray's into a folder, for Grafana's provisioning
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "components" / "monitoring" / "dashboards"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """One of Grafana's: s, reqps, percentunit, bytes, short."""
    queries: tuple[tuple[str, str], ...]
    """An expression and its legend each."""


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    variable: tuple[str, str]
    """A label to choose by, and a metric that has it."""
    panels: tuple[Panel, ...]


_MODEL = '{model=~"$model"}'
_HEAD = '{ray_io_node_type="head"}'
ENDPOINT = Dashboard(
    "adaptfleet-endpoint",
    "Adaptfleet: endpoint",
    ("model", "adaptfleet_requests_total"),
    (
        Panel("Requests by model", "reqps", ((f"sum by (model) (rate(adaptfleet_requests_total{_MODEL}[5m]))", "{{model}}"),)),
        Panel("Requests by tenant", "reqps", ((f"sum by (tenant) (rate(adaptfleet_requests_total{_MODEL}[5m]))", "{{tenant}}"),)),
        Panel(
            "Tokens by tenant", "short", ((f"sum by (tenant, kind) (rate(adaptfleet_tokens_total{_MODEL}[5m]))", "{{tenant}} {{kind}}"),)
        ),
        Panel("Answers by status", "reqps", ((f"sum by (code) (rate(adaptfleet_requests_total{_MODEL}[5m]))", "{{code}}"),)),
        Panel(
            "Time to first token",
            "s",
            tuple(
                (
                    f"histogram_quantile({quantile}, sum by (le) (rate(adaptfleet_time_to_first_token_seconds_bucket{_MODEL}[5m])))",
                    f"p{quantile * 100:.0f}",
                )
                for quantile in (0.5, 0.95, 0.99)
            ),
        ),
        Panel("Time to first token by model, p95", "s", ((f"adaptfleet:time_to_first_token_seconds:p95{_MODEL}", "{{model}}"),)),
        Panel("Time per output token, p95", "s", (("adaptfleet:time_per_output_token_seconds:p95", "{{model_name}}"),)),
        Panel(
            "Duration",
            "s",
            tuple(
                (
                    f"histogram_quantile({quantile}, sum by (le) (rate(adaptfleet_request_duration_seconds_bucket{_MODEL}[5m])))",
                    f"p{quantile * 100:.0f}",
                )
                for quantile in (0.5, 0.95)
            ),
        ),
        Panel("Errors of the server", "percentunit", ((f"adaptfleet:server_errors:ratio5m{_MODEL}", "{{model}}"),)),
        Panel(
            "Requests in the engines",
            "short",
            (
                ("sum by (pod) (vllm:num_requests_running)", "{{pod}} running"),
                ("sum by (pod) (vllm:num_requests_waiting)", "{{pod}} waiting"),
            ),
        ),
        Panel("KV cache in use", "percentunit", (("max by (pod) (vllm:kv_cache_usage_perc)", "{{pod}}"),)),
        Panel(
            "Tokens a second",
            "short",
            (
                ("sum(rate(vllm:prompt_tokens_total[5m]))", "prompts"),
                ("sum(rate(vllm:generation_tokens_total[5m]))", "answers"),
            ),
        ),
        Panel("Preempted requests", "reqps", (("sum by (pod) (rate(vllm:num_preemptions_total[5m]))", "{{pod}}"),)),
        Panel(
            "Loading an adapter",
            "s",
            (("histogram_quantile(0.95, sum by (pod, le) (rate(adaptfleet_adapter_load_seconds_bucket[15m])))", "{{pod}} p95"),),
        ),
        Panel(
            "Adapters dropped for others",
            "short",
            (("sum by (pod) (rate(adaptfleet_adapter_evictions_total[10m])) * 60", "{{pod}} a minute"),),
        ),
    ),
)
FLEET = Dashboard(
    "adaptfleet-fleet",
    "Adaptfleet: fleet and training",
    ("run", "ray_adaptfleet_training_running"),
    (
        Panel("Loss", "short", (('max by (run) (ray_adaptfleet_training_loss{run=~"$run"})', "{{run}}"),)),
        Panel("Tokens a second", "short", (('max by (run) (ray_adaptfleet_training_tokens_per_second{run=~"$run"})', "{{run}}"),)),
        Panel("Workers", "short", (('max by (run) (ray_adaptfleet_training_workers{run=~"$run"})', "{{run}}"),)),
        Panel("Steps", "short", (('max by (run) (ray_adaptfleet_training_step{run=~"$run"})', "{{run}}"),)),
        Panel(
            "Age of the last step", "s", (('time() - max by (run) (ray_adaptfleet_training_stepped_at_seconds{run=~"$run"})', "{{run}}"),)
        ),
        Panel(
            "Age of the newest checkpoint",
            "s",
            (('time() - max by (run) (ray_adaptfleet_training_checkpointed_at_seconds{run=~"$run"})', "{{run}}"),),
        ),
        Panel(
            "Accelerators",
            "short",
            (
                ("adaptfleet:accelerators:in_use", "{{ray_io_cluster}} in use"),
                ("adaptfleet:accelerators:all", "{{ray_io_cluster}} there"),
            ),
        ),
        Panel("Nodes", "short", (("sum by (ray_io_cluster, NodeType) (autoscaler_active_nodes)", "{{ray_io_cluster}} {{NodeType}}"),)),
        Panel(
            "Nodes asked for",
            "short",
            (("sum by (ray_io_cluster, NodeType) (autoscaler_pending_nodes)", "{{ray_io_cluster}} {{NodeType}}"),),
        ),
        Panel(
            "Memory of heads",
            "percentunit",
            ((f"max by (pod) (ray_node_mem_used{_HEAD}) / max by (pod) (ray_node_mem_total{_HEAD})", "{{pod}}"),),
        ),
        Panel("GPU utilisation", "percent", (("avg by (pod) (ray_node_gpus_utilization)", "{{pod}}"),)),
        Panel("Accelerator-hours a day", "short", (("sum_over_time(adaptfleet:accelerator_hours:rate1h[1d:1h])", "{{ray_io_cluster}}"),)),
    ),
)
OURS = (ENDPOINT, FLEET)


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    label, metric = dashboard.variable
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["adaptfleet"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": label,
                    "type": "query",
                    "datasource": _SOURCE,
                    "query": f"label_values({metric}, {label})",
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                    "refresh": 2,
                },
            ]
        },
        "panels": [_grafana_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _grafana_panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {"x": number % _COLUMNS * _WIDTH, "y": number // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(panel.queries)
        ],
    }


def rays() -> dict[str, str]:
    """Ray's own dashboards by name, as the installed Ray makes them."""
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory

    made = {}
    for name in sorted(dir(factory)):
        if name.startswith("generate_") and name.endswith("_grafana_dashboard"):
            content = getattr(factory, name)()
            made[name.removeprefix("generate_").removesuffix("_grafana_dashboard")] = content[0] if isinstance(content, tuple) else content
    return made


def write(folder: Path, with_rays: bool) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {dashboard.uid: json.dumps(grafana(dashboard), indent=1) + "\n" for dashboard in OURS}
    texts |= {f"ray-{name}": text for name, text in (rays() if with_rays else {}).items()}
    written = []
    for name, text in texts.items():
        unfinished = folder / f".{name}.json"
        unfinished.write_text(text, encoding="utf-8")
        written.append(unfinished.replace(folder / f"{name}.json"))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m k8s.dashboards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    for file in write(folder or FOLDER, with_rays=folder is not None):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
