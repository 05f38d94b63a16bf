"""Numbers that flags and variables give, and the type that they end up in."""

import re

from pydantic import BaseModel, ConfigDict

from evermesh.launcher.scripts.errors import ScriptRefused
from evermesh.launcher.scripts.flags import CommandLine


class Frozen(BaseModel):
    """Checked once, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def whole_number(line: CommandLine, field: str, default: int) -> int:
    """A number from 0.

    Raises:
        ScriptRefused: it is none.
    """
    text = line.values.get(field)
    if text is None:
        return default
    if not text.isdecimal():
        raise ScriptRefused(f"{line.spellings[field]} is {text!r}. Give a whole number from 0.")
    return int(text)


def seconds(line: CommandLine, field: str, default: float) -> float:
    """A time from 0.

    Raises:
        ScriptRefused: it is none.
    """
    text = line.values.get(field)
    if text is None:
        return default
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise ScriptRefused(f"{line.spellings[field]} is {text!r}. Give seconds, such as 30.")
    return float(text)
