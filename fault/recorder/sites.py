"""Call sites: texts that are kept once, found again by the code object and the place in it."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

from evermesh.fault.recorder.names import NO_NAME, site_line

_MOST = 1 << 12
"""Sites with a name; later ones have none."""
_DEPTH = 4
"""Frames from ``of_caller`` to whoever called torch.distributed: the method, the function and its wrapper that logs. What
is found there is only what a site is known by: whoever calls methods of groups itself has it too."""
_TORCH = "/torch/distributed/"


class Sites:
    """The call sites of one ring. ``append`` takes the line that names a new one."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self._append = append
        self._lock = threading.Lock()
        self._texts: dict[str, int] = {}
        self._places: dict[tuple[int, int], tuple[CodeType, int]] = {}
        """By id of the code, which the value keeps alive, and the place in it."""
        self.of_caller = self._finder()
        """The index of the line outside torch that made a method of ProcessGroup run; called by what stands in its place."""

    def index_of(self, text: str) -> int:
        """The index of ``text``."""
        return self._texts.get(text) or self._add(text)

    def _finder(self) -> Callable[[], int]:
        places, frame_above, first_seen = self._places, sys._getframe, self._first_seen  # attributes cost time

        def of_caller() -> int:
            try:
                frame = frame_above(_DEPTH)
            except ValueError:  # called by nobody but a module
                frame = frame_above(2)
            code = frame.f_code
            place = places.get((id(code), frame.f_lasti))
            return place[1] if place is not None else first_seen(frame, code)

        return of_caller

    def _first_seen(self, known_by: FrameType, code: CodeType) -> int:
        caller: FrameType | None = sys._getframe(3)
        while caller is not None and _TORCH in caller.f_code.co_filename:
            caller = caller.f_back
        text = _place(caller.f_code.co_filename, caller.f_lineno) if caller is not None else ""
        index = self.index_of(text)
        self._places[id(code), known_by.f_lasti] = (code, index)
        return index

    def _add(self, text: str) -> int:
        with self._lock:
            if text in self._texts:
                return self._texts[text]
            if len(self._texts) >= _MOST:
                return NO_NAME
            index = len(self._texts) + 1
            self._append(site_line(index, text))
            self._texts[text] = index
            return index


def _place(file: str, line: int) -> str:
    """File and line, with the folder that the file is in."""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"
