"""Searches on Ray Tune: `sweep.run_sweep` takes a space to a front of measured, published points and a report."""
