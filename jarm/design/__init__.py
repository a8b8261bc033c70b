"""Optimal design over pairs that are never built: pair spaces, information, exact greedy batches.

Imports core.
"""
