"""Structured pruning: smaller dense checkpoints in Hugging Face's format.

`layout` knows where an architecture keeps its units, `importance` measures them all in one pass, `slicing` chooses which stay and cuts.
"""
