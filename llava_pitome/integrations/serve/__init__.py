"""An OpenAI-compatible endpoint for merging models, on the chat handler of `transformers serve`."""
