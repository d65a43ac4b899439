"""An OpenAI-compatible endpoint whose model merges: `transformers serve` with a guard in front."""
