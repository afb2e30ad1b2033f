"""Model cards, generated from the files of a saved model.

Imports `utils` only, so that a pipeline can write its card when it is saved.
"""
