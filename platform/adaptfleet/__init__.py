"""Adaptfleet: fine-tune, publish and serve adapters of language models on an elastic Ray cluster.

The packages point one way: `contracts` <- `core`, `store` <- `on_ray` <- `cli`, and the jobs and Serve apps beside them.
"""

__version__ = "0.1.0"
