"""One module a contender, each run as a process of its own, so that thread pools do not disturb one another.

A worker may run in another Python environment than the benchmark: it imports its own libraries, `protocol`, and nothing
else of this project, but for `engine`, which is ours.
"""
