"""Evaluation: `evaluation.run_evaluation` scores subjects on the same rows, compares them and records the result beside their versions."""
