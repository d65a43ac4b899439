"""What plugs merging into other projects: lmms-eval, vLLM, transformers serve."""
