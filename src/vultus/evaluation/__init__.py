"""Evaluation of snapshots: metrics, bootstrap intervals, tables, plots.

The networks that it needs are in `backbones`, the names of the metrics in `registry`. Reports are in `reporting`.
"""
