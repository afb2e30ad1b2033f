"""Encoder, flow decoder and prior with their layers, configurations, caches and weight loading.

Imports `utils` only.
"""
