"""KubeRay on one machine: a Kubernetes API on loopback whose RayClusters, RayJobs and RayServices become real Ray processes.

Ray's own v2 autoscaler for KubeRay scales them; the controllers do what the operator's documentation and source say. Not here: images,
volumes, probes, admission, scheduling, network policies. `adaptfleet dev` is the command; docs/dev-cluster.md says what is and is not run.
"""
