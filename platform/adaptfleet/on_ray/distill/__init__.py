"""Distillation on the cluster: the teacher is found and checked before a run, and beside the student in each worker."""
