"""Corpora on disk, the sampler and the batches it yields."""
