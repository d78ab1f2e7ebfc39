"""From pixels or embeddings to verified shards and to batches; knows nothing of ranks' communication or of models."""
