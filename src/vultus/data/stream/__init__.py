"""Training without a local copy: Parquet files on the hub, on an HTTP server or on a disk, read as the training goes.

Here are the files and their faults, the order of the photos, and the cache of embeddings. Not here: the crops of a
photo and its embedding, which are those of a prepared data set (data/crops.py).
"""
