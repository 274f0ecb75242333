"""Strict validation of the manifests, without a cluster: `make check-k8s`; `python -m k8s.validation FOLDER...` for your own overlays.

What is built by kustomize is held against the schemas that the API server would use, with unknown fields refused, and against what the API
server does not know: the operator's own rules, Serve's schema, the jobs' contracts, the locks, and the other manifests.
"""
