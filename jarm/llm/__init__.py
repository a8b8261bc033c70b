"""Language models in Flax NNX as pure functions, read from Hugging Face checkpoints.

Imports core.
"""
