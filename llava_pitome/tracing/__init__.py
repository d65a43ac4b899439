"""Which patch went into which token, layer by layer."""
