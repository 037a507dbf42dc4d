"""Measurement of snapshots: metrics, bootstrap intervals, tables, plots.

The networks that evaluation needs are in `backbones`."""
