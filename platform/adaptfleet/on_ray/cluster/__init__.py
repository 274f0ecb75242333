"""What a private local Ray cluster is made of: its processes, its record for other processes, and the jobs sent to it.

`adaptfleet.on_ray.local_cluster.LocalCluster` puts them together.
"""
