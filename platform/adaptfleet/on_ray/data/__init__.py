"""Preprocessing on the cluster: rows become tokens in parallel, with the same result as in one process."""
