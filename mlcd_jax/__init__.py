"""Multi-Label Cluster Discrimination (MLCD, ECCV 2024) in JAX/Flax."""
