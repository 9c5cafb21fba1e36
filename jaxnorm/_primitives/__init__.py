"""What a norm does to an array of its input's size, as JAX primitives.

`moments`, `line` and `sums`, and the norm of rows with its gradient. Pairs are each
other's transposes, so every derivative and `vmap` reach what a platform computes for
them, which `platforms.py` lists.
"""

from jaxnorm._primitives import platforms as platforms
