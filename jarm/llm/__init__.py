"""Language models in Flax NNX that read Hugging Face checkpoints, to embed text with."""
