"""Settings of a policy that may be no more than ``true`` or ``false``."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, TypeAdapter


def or_default(policy: type[BaseModel]) -> BeforeValidator:
    """``true`` is the default policy, ``false`` none."""

    def read(value: Any) -> Any:
        if isinstance(value, bool | str):
            return policy() if TypeAdapter(bool).validate_python(value) else None
        return value

    return BeforeValidator(read)
