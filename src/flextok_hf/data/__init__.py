"""A named source -> rows -> samples -> batches, for training and evaluation, with a synthetic data set.

Imports `pipelines`, `models` and `utils`.
"""
