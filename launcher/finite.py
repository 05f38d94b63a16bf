"""Values as browsers read JSON, which has no infinity and no NaN."""

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The same for JSON: what is not finite is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
