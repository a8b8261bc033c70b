"""Checks of rules of your own, their float64 references, and counts of compilations.

Imports design and core.
"""
