"""Measurement of snapshots on a prepared data set: metrics, verification, bootstrap intervals, tables and plots.

A new metric is a function in `metrics`, a row in `scores` and an entry in `registry`. Networks that only evaluation
needs are in `backbones`. Reports that combine a training with its evaluation are in `reporting`.
"""
