"""Sliding windows in the config.json of Qwen models, where some layers may have one."""

from typing import Any

from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.settings import Settings

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_window_layers(settings: Settings) -> dict[str, Any]:
    """Values of ``ModelConfig`` for windows: ``layer_types``, or all layers from ``max_window_layers`` on."""
    window = settings.take("sliding_window", None)
    is_used = settings.take("use_sliding_window", False)
    return read_layer_types(settings, window if is_used else None, default_first=28)


def read_layer_types(settings: Settings, window: int | None, *, default_first: int) -> dict[str, Any]:
    """The same where ``window`` is all that says whether there are windows; ``default_first``: of ``max_window_layers``."""
    first = settings.take("max_window_layers", default_first)
    layers, kinds = settings.take("num_hidden_layers"), settings.take("layer_types", None)
    if window is None:
        if kinds is not None and set(kinds) != {_FULL}:
            settings.refuse("layer_types", "there is no sliding_window, or use_sliding_window is not set")
        return {}
    if kinds is None:
        kinds = [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {_SLIDING, _FULL}:
        settings.refuse("layer_types", f"each of {layers} layers is one of {_SLIDING} and {_FULL}")
    sliding = [layer for layer, kind in enumerate(kinds) if kind == _SLIDING]
    if not sliding:
        return {}
    return {"sliding_window": window, "window_layers": None if len(sliding) == layers else sliding}


def write_window_layers(model: ModelConfig) -> dict[str, Any]:
    """The settings that say which layers have a window."""
    return {"use_sliding_window": model.sliding_window is not None, **write_layer_types(model)}


def write_layer_types(model: ModelConfig) -> dict[str, Any]:
    """The same without ``use_sliding_window``."""
    windows = [model.window_of(layer) for layer in range(model.layers)]
    return {
        "sliding_window": model.sliding_window,
        "max_window_layers": next((layer for layer, window in enumerate(windows) if window), model.layers),
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
    }
