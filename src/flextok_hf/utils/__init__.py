"""Helpers outside the data flow: files, tables, contact sheets, metrics, FLOP counts, options.

Imports nothing else of the package.
"""
