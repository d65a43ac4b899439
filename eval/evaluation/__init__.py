"""One evaluation: its plan, its cost, its run through lmms-eval and its results."""
