"""vLLM's LLaVA, merging: found by vLLM through the entry point group `vllm.general_plugins`.

`supported` says what can be served, `choose` has vLLM take the merging class where a model's config asks for
it, `model` is that class, and `serve` the command of scripts/serve_vllm.sh. Only `choose` and `model` know
vLLM; `renamed` copies checkpoints for a vLLM without this package.
"""
