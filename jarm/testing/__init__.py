"""Conformance checks for rules of your own, their float64 references, and counters of traces and compilations.

Imports design and core.
"""
