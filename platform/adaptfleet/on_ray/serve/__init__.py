"""The OpenAI-compatible endpoint: one base, many adapters, one vLLM engine per replica behind Ray Serve.

`deploy` starts and stops it, `deployment` is the Serve deployment, `engine` makes vLLM's engine and application, `catalog` resolves served
model ids in the registry, `door` is what a request passes before it reaches vLLM (routes, keys, sizes, names, metrics), and
`stacked_lora` is the vLLM plug-in that makes multi-LoRA on a CPU correct and fast.
"""
