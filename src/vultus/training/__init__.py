"""Training: losses, the training step of each method, the loop, checkpoints, validation, the run log and trackers.

A new loss, method or tracker belongs here. `launch` is what `vultus train` and `vultus.train` run. The measurement of
a finished snapshot is in `evaluation`. This module imports nothing: a tracker's process loads no torch.
"""
