"""A vLLM plugin with LLaVAs that merge visual tokens, found through the entry point `vllm.general_plugins`.

`registration` selects the merging class by a model's config, `model` and `tiled_models` hold those classes,
with the vision tower of `vision_tower` and the token counts of `tiled_counts`. `validation` refuses what vLLM
cannot do, and `serve_command` is the command that scripts/serve_vllm.sh runs. Only `registration`, the models
and `vision_tower` import vLLM.
"""
