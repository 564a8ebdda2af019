"""The train stage: images and labels to an encoder."""
