"""Sources of images, decoding and augmentation, and input pipelines."""
