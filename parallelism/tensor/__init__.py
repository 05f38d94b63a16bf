"""Tensor and sequence parallelism: the matrices of a model, and its residual stream, shared by the ranks of a group.

Names that need torch are in the modules; nothing here imports it.
"""

from evermesh.parallelism.tensor.sharding import Cut, TensorSharding, chunk_lengths, padded_length, part_of

__all__ = ["Cut", "TensorSharding", "chunk_lengths", "padded_length", "part_of"]
