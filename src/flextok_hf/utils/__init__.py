"""Helpers without a place in the data flow: files, tables, contact sheets, measures, operation counts, options.

Imports nothing else of the package.
"""
