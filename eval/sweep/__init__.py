"""Many evaluations: their combinations, their processes, and the list of them in sweep.json."""
