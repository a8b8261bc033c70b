"""Reward models that leave jarm: one folder, scores of embeddings and of texts, and folders that other programs load.

Imports embedding, reward, llm and data.
"""
