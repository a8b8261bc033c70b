"""Checks of rules of your own, float64 references, counts of compilations.

Imports design and core.
"""
