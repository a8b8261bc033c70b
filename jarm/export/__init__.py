"""Reward models that leave jarm: one folder, and the scores of embeddings.

Imports reward.
"""
