"""The cluster stage: finds centers of the embeddings and labels every row."""
