"""An OpenAI-compatible endpoint whose model merges: handlers of `transformers serve` behind a guard."""
