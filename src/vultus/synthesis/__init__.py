"""Labelled data sets of people who do not exist: people kept apart, their faces checked by a judge, shards, a card.

The engines that share the work are in _engines.py, the marks of the images in images/.
"""
