"""Image sources, transforms and input pipelines."""
