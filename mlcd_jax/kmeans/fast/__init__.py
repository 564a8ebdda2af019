"""Approximate passes for CPUs, behind the interface of `kmeans.assign`."""
