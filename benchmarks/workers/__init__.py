"""Worker processes, one module per engine under test; separate processes keep thread pools from disturbing each other.

A worker may run in a different Python environment than the benchmark. It imports only its own libraries and
`protocol`; `engine` also imports our engine.
"""
