"""The only place that imports Ray and vLLM: training on a cluster, local clusters, job submission, and serving.

`serve/` is the OpenAI-compatible endpoint: vLLM's own application in a Ray Serve deployment, with the registry's adapters in one engine.
"""
