"""A conversation with a LLaVA: its turns, streamed answers, and the terminal."""
