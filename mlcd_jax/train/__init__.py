"""The train stage: trains an encoder on images and their labels."""
