"""Rounding weights into checkpoints that vLLM loads.

llm-compressor rounds, in an environment of its own (`environment`) and a process of its own (`quantizer`, which is handed a `request`).
`schemes` says what a contract's scheme means for it, `fit` whether it fits the model, `sensitivity` and `knapsack` which layers keep more
bits, and `dequantization` reads the result back.
"""
