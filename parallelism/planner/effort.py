"""How long a plan is searched for: a small share of the step that it is for.

The next batch is planned while this one is trained. A plan that takes longer than a step is waited for, and one that takes
nearly as long has a core that training may need; a short step has little to gain from either. The measure is what the step
takes by the cost model, never a clock, so that a plan stays a pure function of its arguments.
"""

_FULL_S = 2.0
"""Steps for which a search may be as long as it ever is: some 0.05 s on up to 16 ranks, a fortieth of the step."""
_LEAST = 0.01
"""Of the full effort; with less, a search ends before it has found anything."""


def effort_of(step_s: float) -> float:
    """The part of the full effort that a step of so many seconds gets, by prediction; 0: no search that can be left out."""
    effort = min(1.0, step_s / _FULL_S)
    return effort if effort >= _LEAST else 0.0


__all__ = ["effort_of"]
