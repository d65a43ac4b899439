"""Evaluation of merging: commands run from a checkout as `python -m eval.NAME key=value ...`.

run: one model, merged beside unmerged, on lmms-eval's tasks. sweep, recipe: many such runs. timing: how long
they take. report: tables, tests and plots of them. ablate, search: settings, on training images.
throughput: of servers. random_model, merge_image: a model and an image for the documents.
"""
