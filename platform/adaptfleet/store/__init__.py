"""Where artifacts live: an object store by URL, and in it the registry of immutable versions and movable aliases.

Knows neither core nor Ray. `registry.Registry` is what the rest of the house uses; `objects` reads and writes objects, `records` says what
lies where, `index` what is published, `aliases` how they move, `content` and `adapter_check` what may be published, `cache` brings files
here, `lineage` tells what an artifact was made from.
"""
