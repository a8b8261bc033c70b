"""Annotators, metrics and all else that looks at gold rewards.

Imports core.
"""
