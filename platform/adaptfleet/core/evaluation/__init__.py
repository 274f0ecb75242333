"""How good a model's answers are.

`answers` compares answers in pure Python, so that scores are recomputed anywhere from saved ones; `rouge` compares texts; `row_scores`
makes rows into metrics and `intervals` says how sure these are. `held_out` measures a model in training, `row_losses` any model row by row.
"""
