"""Acquisition rules: which pairs to ask about."""
