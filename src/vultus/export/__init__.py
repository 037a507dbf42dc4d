"""Snapshots for others: ONNX files, model cards, folders for the Hugging Face hub. No training, no reports."""
