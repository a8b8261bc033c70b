"""From texts to a store of embeddings, once (`jarm embed`).

Imports llm, data and core.
"""
