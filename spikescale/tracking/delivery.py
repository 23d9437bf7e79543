"""A thread that hands records to a store which may be slow, down or unwilling.

The caller never waits and never sees an error. What may pass (no connection, a busy server) is tried
again for as long as the run lasts; what the store refuses is lost, said once for each kind of refusal.
Files have a place of their own behind the records, so that an artifact store that fails costs the
files and not the metrics.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

BUFFER = 100_000  # records that wait at most
RETRY_SECONDS = 5.0
END_RETRY_SECONDS = 0.5  # between tries when the run is over
NEVER_ANSWERED_SECONDS = 2.0  # patience at the end with a store that never took anything
STALLED_SECONDS = 10.0  # patience at the end with a store that took something before
FILE_TRIES = 3
RECORD_TRIES = 5


@dataclass
class _Item:
    send: Callable[[], None]
    file: str | None = None
    is_end: bool = False
    tries: int = 0
    due: float = 0.0  # monotonic time before which a file is not tried again
    arrived_before: int = 0  # what had arrived when this failed for the first time


class Delivery:
    """Runs `start` once, then everything put in, on a thread of its own.

    name: the store, as messages call it.
    probe: raises what is wrong when the store does not answer; costs at most a few seconds.
    may_pass: whether an error is worth another try.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], None],
        probe: Callable[[], None],
        may_pass: Callable[[BaseException], bool],
        retry_seconds: float = RETRY_SECONDS,
        buffer: int = BUFFER,
    ) -> None:
        self._name, self._start, self._probe, self._may_pass = name, start, probe, may_pass
        self._retry_seconds, self._buffer = retry_seconds, buffer
        self._records: deque[_Item] = deque()
        self._files: deque[_Item] = deque()
        self._end: _Item | None = None
        self._ended = self._ending = self._stopped = self._off = self._started = False
        self._accepted = self._arrived = 0
        self._failures = 0  # since something last arrived
        self._announced = False
        self._last_error = ""
        self._said: set[tuple[bool, str]] = set()
        self._lost_files: list[str] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Records and files that have not arrived (yet)."""
        return self._accepted - self._arrived

    def put(self, send: Callable[[], None], file: str | None = None) -> None:
        """Call `send` on the thread; `file` names the file that it stores. A full buffer drops it."""
        with self._changed:
            self._accepted += 1
            place = self._records if file is None else self._files
            if not self._off and len(place) < self._buffer:
                place.append(_Item(send, file))
                self._changed.notify_all()
            elif file is not None:
                self._lost_files.append(file)

    def finish(self, end: Callable[[], None], seconds: float) -> bool:
        """Deliver what is left, then call `end`, waiting at most `seconds`; whether everything arrived.

        A store that is failing is waited for more briefly: 2 s when it never took anything, else 10 s
        without progress.
        """
        with self._changed:
            self._end, self._ending = _Item(end, is_end=True), True
            self._changed.notify_all()
        began = since = time.monotonic()
        arrived = self._arrived
        patience = STALLED_SECONDS if self._started else NEVER_ANSWERED_SECONDS
        while self._thread.is_alive():
            now = time.monotonic()
            if self._arrived != arrived:
                arrived, since = self._arrived, now
            if now - began >= seconds or (self._failures and now - since >= patience):
                break
            self._thread.join(0.05)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._report()
        return self._ended and not self.lost

    def _report(self) -> None:
        if self._off:
            return  # said when it was turned off
        files = [*self._lost_files, *(item.file for item in self._files if item.file)]
        reason = f" ({self._last_error})" if self._last_error else ""
        if self.lost:
            named = f", among them {', '.join(files)}" if files else ""
            log.warning(
                "MLflow at %s: %d records did not arrive%s%s; the run folder has them",
                self._name,
                self.lost,
                named,
                reason,
            )
        elif not self._ended:
            log.warning("MLflow at %s: the run could not be marked as ended%s", self._name, reason)

    def _work(self) -> None:
        while not self._begin():
            if self._off or self._stopped:
                return
            self._pause()
        while (item := self._next()) is not None:
            self._deliver(item)

    def _begin(self) -> bool:
        try:
            self._probe()
            self._start()
        except Exception as error:  # whatever a store or the network throws must not reach the training
            if self._may_pass(error):
                self._note_failure(error, answers=False)
                return False
            with self._changed:
                self._off = True
                self._records.clear()
                self._files.clear()
            log.warning(
                "MLflow at %s is not used for this run: %s; metrics.jsonl has everything",
                self._name,
                one_line(error),
            )
            return False
        self._started = True
        self._note_success()
        return True

    def _next(self) -> _Item | None:
        # Records first, then files whose time has come; the end when nothing is left.
        with self._changed:
            while not self._stopped:
                if self._records:
                    return self._records.popleft()
                now = time.monotonic()
                ready = next((item for item in self._files if self._ending or item.due <= now), None)
                if ready:
                    self._files.remove(ready)
                    return ready
                if self._ending:
                    end, self._end = self._end, None
                    return end
                wait = min((item.due for item in self._files), default=None)
                self._changed.wait(None if wait is None else wait - now)
            return None

    def _deliver(self, item: _Item) -> None:
        try:
            if self._failures:
                self._probe()
        except Exception as error:
            self._put_back(item, first=True)
            self._note_failure(error, answers=False)
            self._pause()
            return
        try:
            item.send()
        except Exception as error:
            self._failed(item, error)
            return
        if item.is_end:
            self._ended = True
        else:
            self._arrived += 1
        self._note_success()

    def _failed(self, item: _Item, error: Exception) -> None:
        answers = self._answers()
        if answers and item.file is not None:
            # Its own store failed, which may be another than that of the metrics.
            item.tries += 1
            item.due = time.monotonic() + self._retry_seconds
            if item.tries < FILE_TRIES:
                self._put_back(item)
            else:
                self._lose(item, error)
            return
        if answers and not self._may_pass(error):
            self._lose(item, error)
            return
        if answers and not item.is_end:
            # The store takes others but never this one: an error that looks passing and is not.
            if item.tries == 0:
                item.arrived_before = self._arrived
            item.tries += 1
            if item.tries >= RECORD_TRIES and self._arrived > item.arrived_before:
                self._lose(item, error)
                return
        self._put_back(item, first=not answers)
        self._note_failure(error, answers)
        self._pause()

    def _answers(self) -> bool:
        try:
            self._probe()
        except Exception:
            return False
        return True

    def _put_back(self, item: _Item, first: bool = False) -> None:
        with self._changed:
            if item.is_end:
                self._end = item
                return
            place = self._records if item.file is None else self._files
            if first:
                place.appendleft(item)
            else:
                place.append(item)

    def _lose(self, item: _Item, error: Exception) -> None:
        self._last_error = one_line(error)
        kind = (item.file is not None, str(getattr(error, "error_code", type(error).__name__)))
        if item.file is not None:
            self._lost_files.append(item.file)
        if kind not in self._said:
            self._said.add(kind)
            what = "a record" if item.file is None else item.file
            log.warning("MLflow at %s does not take %s: %s", self._name, what, self._last_error)

    def _note_failure(self, error: Exception, answers: bool) -> None:
        self._failures += 1
        self._last_error = one_line(error)
        # A single hiccup of a store that answers is not worth a word.
        if not self._announced and (not answers or self._failures > 1):
            self._announced = True
            log.warning(
                "MLflow at %s does not answer (%s); training goes on, metrics wait",
                self._name,
                self._last_error,
            )

    def _note_success(self) -> None:
        if self._announced:
            log.warning("MLflow at %s is back; what waited is being sent", self._name)
        self._failures, self._announced, self._last_error = 0, False, ""

    def _pause(self) -> None:
        with self._changed:
            if self._ending:
                self._changed.wait_for(lambda: self._stopped, min(self._retry_seconds, END_RETRY_SECONDS))
            else:
                self._changed.wait_for(lambda: self._ending, self._retry_seconds)


def one_line(error: BaseException) -> str:
    """The error's text on one line, shortened in its middle: the cause often stands at the end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:120]} ... {text[-115:]}"
