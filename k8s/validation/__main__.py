"""python -m k8s.validation [FOLDER ...]: every folder of overlays/ that can be applied, or those given."""

import argparse
import os
import sys
import time
from pathlib import Path

from k8s.validation import crds
from k8s.validation.checks import check_folder
from k8s.validation.manifests import ROOT, BuildError, overlays
from k8s.validation.versions import pinned


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.validation", description=__doc__)
    parser.add_argument("folder", nargs="*", type=Path, help="folders with a kustomization.yaml; default: all of k8s/overlays")
    folders = [folder.resolve() for folder in parser.parse_args().folder] or overlays()
    place = crds.folder()
    if place is None:
        print(f"check-k8s: KubeRay's CRDs ({crds.VERSION}) are not at hand. Fetch them: {crds.HOW_TO_FETCH}", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    started = time.monotonic()
    known, status = crds.Crds(place), 0
    for finding in pinned():
        print(finding)
        status = 1
    for folder in folders:
        try:
            found = check_folder(folder, known)
        except BuildError as error:
            print(error)
            status = 1
            continue
        shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        print(f"{shown}: {f'{len(found)} findings' if found else 'fine'}")
        for finding in found:
            print(f"  {finding}")
        status = status or bool(found)
    print(f"check-k8s: {len(folders)} folders in {time.monotonic() - started:.1f} s")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
