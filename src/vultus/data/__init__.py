"""From photos to a prepared data set (sources, prepare, shards), and from a prepared data set to batches (dataset)."""
