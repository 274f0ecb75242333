"""What the autoscaler of the cluster joined may add, as far as it says."""

import ray


def autoscaler_limits() -> dict[str, float] | None:
    """What the cluster's autoscaler may come to have; empty where there is none. None: there is one, and it does not say (KubeRay's)."""
    from ray._private.state import state  # Ray Train itself asks here; there is no public way

    said = state.get_max_resources_from_cluster_config()
    if not said and _is_a_pool():
        return None
    return {name: float(amount) for name, amount in (said or {}).items()}


def _is_a_pool() -> bool:
    """Nodes of named groups, under an autoscaler that has reported. Ray 2.60's for KubeRay does not report its groups' limits."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated import autoscaler_pb2

    if not any(node["Alive"] and node["Labels"].get("ray.io/node-group") for node in ray.nodes()):
        return False
    reply = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]  # made of a .proto
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return bool(reply.autoscaling_state.autoscaler_state_version)
