"""Text in the cells of a table."""


def cell(text: str) -> str:
    """``text`` on one line, with bars that end no cell; those in code end none anyway."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if at % 2 else part.replace("|", r"\|") for at, part in enumerate(parts))
