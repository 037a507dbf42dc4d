"""From embeddings and noise to faces: noise and random identities, the population prior, where embeddings come from
(files, photos), generation, grids of faces.

`generator` holds what `vultus.load` returns. No loss, no metric.
"""
