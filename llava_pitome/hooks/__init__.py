"""Where tokens merge: one file a place."""
