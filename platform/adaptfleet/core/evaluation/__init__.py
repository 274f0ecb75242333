"""How good a model's answers are. Pure Python: scores are recomputed anywhere from saved answers."""
