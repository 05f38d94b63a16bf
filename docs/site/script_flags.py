"""The reference of the flags of ``evermesh launch SCRIPT``, from the table that reads them."""

from docs.site.cells import cell
from evermesh.launcher.scripts.flags import FLAGS, FOREIGN, Flag

_HEAD = """# Flags for scripts

`evermesh launch [FLAGS] SCRIPT ARGS...` takes the flags of torchrun, and a few words of its own:
[Launch any script](../launch/scripts.md) says how it is used. Each may be spelled with underscores, and given as a
variable; a flag wins over its variable. This page is made from the table that reads them.
"""
_IDLE = """
## Without effect

Flags of torchrun that are accepted and change nothing here:
"""
_FOREIGN = """
## Of other launchers

Flags of the launchers of DeepSpeed and Accelerate, and older ones of torch's, are refused with what to use instead:

| flag | instead |
|---|---|
"""


def script_flags_page() -> str:
    """The page, in Markdown."""
    working, idle = ([flag for flag in FLAGS if flag.has_effect is wanted] for wanted in (True, False))
    foreign = "\n".join(f"| `{name}` | {cell(way_out)} |" for name, way_out in FOREIGN.items())
    return f"{_HEAD}\n{_table(working, 'meaning')}\n{_IDLE}\n{_table(idle, 'because')}\n{_FOREIGN}{foreign}\n"


def _table(flags: list[Flag], text: str) -> str:
    return "\n".join([f"| flag | {text} | variable |", "|---|---|---|", *map(_row, flags)])


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in flag.names) + (f" `{flag.metavar}`" if flag.metavar else "")
    text = flag.help.replace("*", r"\*")
    return f"| {cell(names)} | {cell(text)} | `{flag.variable}` |"
