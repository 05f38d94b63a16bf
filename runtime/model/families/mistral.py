"""Mistral: LLaMA with a sliding window in every layer (Jiang et al., arXiv 2310.06825)."""

from typing import Any

from evermesh.runtime.model.families.family import DENSE_NAMES, Family
from evermesh.runtime.model.families.settings import Settings


def _window(settings: Settings) -> dict[str, Any]:
    if not settings.has("sliding_window"):
        settings.refuse(
            "sliding_window", "it has to be there: releases of transformers differ in what a missing one means"
        )
    return {"sliding_window": settings.take("sliding_window", None)}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    DENSE_NAMES,
    read=_window,
    write=lambda model: {"sliding_window": model.sliding_window},
    may=frozenset({"sliding_window"}),
)
