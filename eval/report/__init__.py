"""A sweep's report: its results read, tested for significance, as tables, plots, sentences and HTML."""
