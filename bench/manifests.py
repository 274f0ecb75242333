"""How many seeded mistakes the validation of the manifests finds, and whether it finds any in what is right.

python bench/manifests.py [SAMPLES]      SAMPLES: ray-operator/config/samples of KubeRay's repository at the pinned version
"""

import json
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from k8s.validation import crds, manifests, operator_rules  # noqa: E402
from k8s.validation.checks import check  # noqa: E402
from tests.manifests.test_mistakes import MISTAKES, findings_of  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "manifests.json"


def main() -> int:
    place = crds.folder()
    if place is None:
        print(f"KubeRay's CRDs are not at hand. Fetch them: {crds.HOW_TO_FETCH}")
        return 2
    kuberay, began = crds.Crds(place), time.monotonic()
    built = {str(folder.relative_to(manifests.OVERLAYS)): manifests.build(folder) for folder in manifests.overlays()}
    clean = {
        name: check(documents, built.get(name.partition("/")[0], []) if "/" in name else [], kuberay) for name, documents in built.items()
    }
    checked_s = time.monotonic() - began
    caught = [mistake.name for mistake in MISTAKES if any(mistake.says in found for found in findings_of(mistake, built, kuberay))]
    results = {
        "kuberay": crds.VERSION,
        "overlays": len(built),
        "documents": sum(len(documents) for documents in built.values()),
        "findings_in_overlays": sum(len(found) for found in clean.values()),
        "check_s": round(checked_s, 1),
        "mutations_total": len(MISTAKES),
        "mutations_caught": len(caught),
        "mutations_missed": sorted({mistake.name for mistake in MISTAKES} - set(caught)),
    }
    if len(sys.argv) > 1:
        results |= _of_samples(Path(sys.argv[1]), kuberay)
    elif RESULTS.is_file():
        results |= {key: value for key, value in json.loads(RESULTS.read_text()).items() if key.startswith("samples_")}
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(RESULTS)
    print(json.dumps(results, indent=1))
    return 0 if len(caught) == len(MISTAKES) and not results["findings_in_overlays"] else 1


def _of_samples(folder: Path, kuberay: crds.Crds) -> dict[str, object]:
    """Upstream's samples are valid: whatever is found by the schemas or the operator's rules is a false alarm."""
    documents, alarms = 0, []
    for file in sorted(folder.rglob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            if document and document.get("apiVersion") == "ray.io/v1":
                documents += 1
                alarms += [f"{file.name}: {found}" for found in (*kuberay.findings(document), *operator_rules.findings(document))]
    return {"samples_documents": documents, "samples_false_alarms": alarms}


if __name__ == "__main__":
    sys.exit(main())
