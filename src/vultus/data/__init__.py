"""Photos to a prepared data set, and a prepared data set to batches."""
