"""hopescale: trains HOPE predictors on clips of V-JEPA 2 embeddings, from a laptop CPU to many GPUs."""

import os

__version__ = "0.1.0"

# Read by torch once, when it first allocates. Fast weights are made anew at every write; from small pages, a pass over
# a new tensor of that size costs a CPU four times as much as one over an old tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
