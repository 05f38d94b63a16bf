"""When a view is in force, when an agent stands for election, and when it is elected: pure functions.

Two majorities of the members of a view have a member in common, and so do majorities of views that differ in one member. All
that is promised here rests on that.
"""

from collections.abc import Collection, Iterable, Mapping

from evermesh.launcher.succession.protocol import Answer, View

ELECTORS = 3
"""A view with fewer members elects nobody: two would both have to live, and one of them is with the controller."""


def elects(view: View | None) -> bool:
    """Whether the members of ``view`` could give the office to another."""
    return view is not None and len(view.members) >= ELECTORS


def has_majority(view: View, identities: Collection[str]) -> bool:
    """Whether more than half of the members of ``view`` are among ``identities``."""
    return 2 * len(view.identities & set(identities)) > len(view.members)


def is_installed(view: View, before: View | None, accepted: Collection[str]) -> bool:
    """Whether ``view`` is in force when these have accepted it; ``before`` was in force until then.

    Where nobody can be elected, neither by the old view nor by the new one, the controller needs nobody's consent.
    """
    old = before is None or not elects(before) or has_majority(before, accepted)
    return old and (not elects(view) or has_majority(view, accepted))


def newest(views: Iterable[View | None]) -> View | None:
    """The view with the highest version."""
    return max((view for view in views if view is not None), key=lambda view: view.version, default=None)


def why_not_stand(me: str, answers: Mapping[str, Answer]) -> str | None:
    """Why an agent that hears no controller must not stand for election now; None: it may. ``answers`` include its own.

    This keeps the peace; that two are never elected does not depend on it.
    """
    view = newest(answer.view for answer in answers.values())
    if view is None or not elects(view):
        return "too few agents take part to elect anybody"
    if me not in view.holders:
        return "it holds no copy of the journal"
    if not has_majority(view, answers):
        return f"only {len(view.identities & answers.keys())} of {len(view.members)} agents answer"
    for answer in answers.values():
        if answer.hears:
            return "another agent hears the controller"
        if answer.is_reviving:
            return "another agent is starting a controller"
    longest = _longest_holder(view, answers)
    return None if answers[me].length >= answers[longest].length else "another copy of the journal is longer"


def turn_of(me: str, view: View, answers: Mapping[str, Answer]) -> int:
    """How many go before ``me``, a holder of ``view``, if all that may stand do so one after the other."""
    longest = answers[_longest_holder(view, answers)].length
    able = [one for one in view.holders if one in answers and answers[one].length == longest]
    return able.index(me)


def elected(me: str, answers: Mapping[str, Answer]) -> View | None:
    """The view that ``me`` takes over with these answers to its request for votes, its own included; None: not elected.

    Every entry that a controller acted upon was acknowledged by all holders of a view, and a view is in force when a majority
    has it. So a holder of the newest view that any of a majority knows has every such entry; and from their promise on none
    is acknowledged to an older term, for it holds a copy itself.
    """
    granted = {identity: answer for identity, answer in answers.items() if answer.accepted}
    view = newest(answer.view for answer in granted.values())
    if view is None or not elects(view) or me not in granted or me not in view.holders:
        return None
    if not has_majority(view, granted) or granted[me].length < granted[_longest_holder(view, granted)].length:
        return None
    return view


def _longest_holder(view: View, answers: Mapping[str, Answer]) -> str:
    """The holder with the longest copy: a copy that a damaged disk has cut is shorter than it was acknowledged."""
    return max((one for one in view.holders if one in answers), key=lambda one: answers[one].length)
