"""What becomes of activations until the backward pass needs them: they stay, are computed again, or wait in host memory.

Names that need torch are in the modules; nothing here imports it.
"""

from evermesh.runtime.memory.sizes import offloaded_bytes, offloaded_tokens, step_offloaded_bytes

__all__ = ["offloaded_bytes", "offloaded_tokens", "step_offloaded_bytes"]
