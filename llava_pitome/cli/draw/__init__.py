"""Pictures of a merge: which patches became one token, and PiToMe's energy; for `draw` and the web page."""
