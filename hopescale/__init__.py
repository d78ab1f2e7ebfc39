"""hopescale: trains HOPE predictors on clips of V-JEPA 2 embeddings, from a laptop CPU to many GPUs."""

__version__ = "0.1.0"
