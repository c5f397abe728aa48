"""What a run's report should say, and what went wrong after its training without ending it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from raycomp.errors import RaycompError
from raycomp.pipeline.user_code import ends_the_process
from raycomp.speedup.graph.program import cause_of

_LOG = logging.getLogger(__name__)


class Notes:
    """Sentences for the report, in order.

    What comes after the last checkpoint must not lose it: whatever is raised there becomes a note, and the model is
    published without what failed.
    """

    def __init__(self, *given: str) -> None:
        self._said = list(given)

    def say(self, *notes: str) -> None:
        """Adds notes."""
        self._said += notes

    @contextmanager
    def instead_of(self, lost: str) -> Iterator[None]:
        """Runs the block; if it raises, a note says what is lost, and why. What ends the process ends it here, too.

        Args:
            lost: what there is not then: "there is no model.pt2".
        """
        try:
            yield
        except BaseException as error:  # a user's code may call sys.exit()
            if ends_the_process(error):
                raise
            _LOG.debug("%s", lost, exc_info=True)
            cause = str(error) if isinstance(error, RaycompError) else cause_of(error)
            self.say(f"{lost}: {cause}")

    def __call__(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(self._said))
