"""What a run measures: the catalog of names, the recorder, and the sinks that publish the numbers.

Importing this package imports no torch: the Prometheus sidecar process starts from it.
"""
