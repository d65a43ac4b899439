"""Images of merges: which patches became one token, and the tokens' energies; for `draw` and the web page."""
