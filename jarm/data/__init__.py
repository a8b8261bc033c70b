"""Tables of responses and the crash-safe store of their embeddings: read, checked, standardised.

Imports core.
"""
