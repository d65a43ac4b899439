"""A conversation with a LLaVA, merging or not: its turns, its streamed answers, its terminal."""
