"""Reinforcement learning from AI feedback in JAX."""

import os

# transformers is used for its tokenizers alone; without this it warns at each start that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
