"""vultus: faces from face embeddings, with a conditional GAN trained from scratch.

>>> from vultus.models.snapshot import load_snapshot
>>> snapshot = load_snapshot("run/snapshot.safetensors")
>>> x = snapshot.network(z, c)  # z [N, 100] noise, c [N, 512] unit-norm embeddings -> [N, 3, 128, 128] in [-1, 1]
"""
