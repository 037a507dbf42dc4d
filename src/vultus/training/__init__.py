"""Training: losses, training steps, the loop, checkpoints, validation, run log, trackers.

Nothing here measures a finished snapshot; see `vultus.evaluation`."""
