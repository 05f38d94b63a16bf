"""Rotary positions in a Hugging Face config.json: ``rope_theta`` and ``rope_scaling``, since transformers 5 in one place."""

from typing import Any

from evermesh.runtime.model.config import ModelConfig, YarnRope
from evermesh.runtime.model.families.settings import Settings

_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_positions",
}
_KINDS: dict[str, dict[str, str]] = {"linear": {"factor": "factor"}, "llama3": _LLAMA3, "yarn": _YARN}
"""Their names of the fields of our kinds."""


def read_rope(settings: Settings, default_theta: float) -> dict[str, Any]:
    """Values of ``ModelConfig`` for rotary positions.

    Raises:
        UnsupportedModel: a kind or a field that this version does not compute.
    """
    place = "rope_parameters" if settings.has("rope_parameters") else "rope_scaling"
    theta = settings.take("rope_theta", default_theta)
    settings.expect("partial_rotary_factor", 1.0)
    fields = dict(settings.take(place, {}))
    theta = fields.pop("rope_theta", theta)
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        settings.refuse(place, "only whole heads can be rotated")
    kinds = {fields.pop("rope_type", None), fields.pop("type", None)} - {None}
    kind = kinds.pop() if kinds else "default"
    if kind == "default" and not fields:
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in _KINDS:
        settings.refuse(place, f"of its kinds only {', '.join(_KINDS)} are supported")
    names = _KINDS[kind]
    unknown = sorted(fields.keys() - names.keys())
    if unknown:
        settings.refuse(place, f"this version does not know its {', '.join(unknown)}")
    if "original_positions" in names.values() and fields.get("original_max_position_embeddings") is None:
        fields["original_max_position_embeddings"] = settings.take("max_position_embeddings")
    scaling = {names[name]: value for name, value in fields.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **scaling}}


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Settings for rotary positions, in the form that transformers 4 and 5 and other programs read."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    names = {ours: theirs for theirs, ours in _KINDS[scaling.kind].items()}
    values = scaling.model_dump(exclude={"kind"}, exclude_none=True)
    if isinstance(scaling, YarnRope) and scaling.truncate:
        del values["truncate"]  # the default, which older programs do not know
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": {"rope_type": scaling.kind, **{names[name]: value for name, value in values.items()}},
    }
