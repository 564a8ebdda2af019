"""Approximate passes for CPUs, with the interface `kmeans.assign.Assigner`.

The files are:

  screened      the passes: which rows are searched, and how
  candidates    the two searches: among all centers, or among a few candidates
  dimensions    what is tuned by a sample of the rows
  carried_sums  the sums of one pass as the start of the next
"""
