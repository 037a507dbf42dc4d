"""What a leaked template reveals: protections of embeddings, an attack that inverts them, and its success.

Training and the metrics of generators are elsewhere; this package uses a finished snapshot.
"""
