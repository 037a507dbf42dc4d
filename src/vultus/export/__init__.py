"""Snapshots for other programs and people: ONNX files, model cards, folders for the Hugging Face hub and their
upload.

A new export format belongs here. Reading such files is in `models`.
"""
