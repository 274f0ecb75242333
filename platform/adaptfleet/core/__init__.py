"""The mathematics: models, methods, data, loops and metrics on torch, transformers and PEFT. Knows neither Ray nor vLLM.

`data` turns rows into packed tokens, `models` loads bases, `methods` adapts them, `evaluation` scores answers.
"""
