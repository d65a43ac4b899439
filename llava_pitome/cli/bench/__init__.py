"""`llava-pitome bench`: time, memory and FLOPs of merging models and the dense one."""
