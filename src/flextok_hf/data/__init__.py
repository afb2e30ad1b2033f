"""Data for training and evaluation: source -> rows -> samples -> batches. Includes a synthetic dataset.

Imports `pipelines`, `models` and `utils`.
"""
