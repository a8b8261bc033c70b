"""Reward heads on frozen embeddings, and how ensembles of them are fitted to labelled pairs.

Imports core.
"""
