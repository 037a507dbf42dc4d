"""Photos to a prepared data set, and a prepared data set to batches.

A new source of photos belongs into `sources`. A prepared data set stores images beside their embeddings; embedding a
single photo for generation is in `sampling/conditioning`.
"""
