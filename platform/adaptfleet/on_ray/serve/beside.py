"""What stands beside vLLM's application behind the same door: files and batches, the status and its page."""

from adaptfleet.contracts.home import store_url
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.serve.batch_routes import BatchRoutes
from adaptfleet.on_ray.serve.batch_runner import BatchRunner
from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.door import Door
from adaptfleet.on_ray.serve.siblings import Siblings
from adaptfleet.on_ray.serve.status import Status, page
from adaptfleet.on_ray.serve.tenancy import Tenancy
from adaptfleet.store.batches import BatchStore
from adaptfleet.store.objects import Objects


def put_beside(door: Door, spec: ServingSpec, tenancy: Tenancy, catalog: Catalog, siblings: Siblings | None = None) -> Status:
    """Called in the replica's event loop: starts what works without being asked."""
    store = BatchStore(Objects(store_url()))
    batches = BatchRoutes(store, spec.max_file_bytes)
    status = Status(catalog, tenancy, None if siblings is None else siblings.status)
    door.beside |= {"/v1/files": batches, "/v1/batches": batches, "/status": status}
    door.public |= page()
    tenancy.exchange.start()
    # Half the engine's places at most: live requests come first in its queue, but a running row keeps its place.
    BatchRunner(store, tenancy.exchange, door.inside, tenancy.is_enabled, max(1, spec.max_num_seqs // 2)).start()
    return status
