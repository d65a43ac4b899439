"""A vLLM plugin with a LLaVA that merges visual tokens, found through the entry point `vllm.general_plugins`.

`registration` selects the merging class by a model's config, `model` is that class, `validation` refuses what
vLLM cannot do, and `serve_command` is the command that scripts/serve_vllm.sh runs. Only `registration` and
`model` import vLLM.
"""
