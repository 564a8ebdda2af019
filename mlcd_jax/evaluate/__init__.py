"""The evaluate stage: tasks on frozen features, ours beside the baselines."""
