"""Campaigns: the commands under many random disturbances, and the readers on many damaged files.

Each is a program with a long form; tests/test_campaigns.py runs a short form. docs/reliability.md has the figures.
"""
