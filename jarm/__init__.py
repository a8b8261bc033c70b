"""jarm: active reward modelling in JAX."""
