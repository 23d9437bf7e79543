"""HTTP with manners: one request at a time, at a limited rate, waiting as long as the server asks."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from spikescale.errors import UserError

RETRIED = (429, 500, 502, 503, 504, 529)  # 529: overloaded, of LLM providers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manners:
    """How a server is treated.

    Attributes:
        requests_per_second: at most, counted between the starts of two requests.
        max_attempts: of one request, before the work stops (to be continued later).
        first_wait: seconds before the second attempt where the server names none; doubled each time.
        longest_wait: of such waits; a server that asks for more than ten times that is obeyed by stopping.
        timeout: seconds without an answer, or without the next bytes of one.
    """

    requests_per_second: float = 2.0
    max_attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 120.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.requests_per_second > 0:
            raise UserError(f"requests_per_second = {self.requests_per_second}: must be positive")
        if self.max_attempts < 1:
            raise UserError(f"max_attempts = {self.max_attempts}: must be at least 1")


class RefusedError(UserError):
    """The server's answer is final; `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Gets and posts JSON.

    Args:
        headers: of every request, the User-Agent among them.
        manners: rate and patience.
        secrets: texts that are blotted out of every message.
        sleep, clock: for tests.

    Attributes:
        requests: sent so far. retries: how often each reason made one be sent again.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        manners: Manners | None = None,
        secrets: Sequence[str] = (),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import requests

        self.manners = manners or Manners()
        self.requests = 0
        self.retries: Counter[str] = Counter()
        self._secrets = [secret for secret in secrets if secret]
        self._sleep, self._clock = sleep, clock
        self._next = clock()
        self._session = requests.Session()
        self._session.headers.update({"Accept": "application/json", **headers})
        # A password of ~/.netrc would silently take the place of our own Authorization header.
        self._session.auth = lambda request: request

    def get(
        self,
        url: str,
        parameters: Mapping[str, str] | None = None,
        busy: Callable[[Any], str | None] = lambda answer: None,
    ) -> Any:
        """The JSON at `url`. `busy` may find in it a reason to ask again later.

        Raises RefusedError for a final error status, UserError when the attempts are used up.
        """
        return self._ask("GET", url, busy, params=dict(parameters or {}))

    def post(self, url: str, body: Any) -> Any:
        """The JSON answer to a JSON body. Redirects are not followed, so keys go nowhere else."""
        return self._ask("POST", url, lambda answer: None, json=body, allow_redirects=False)

    def _ask(self, method: str, url: str, busy: Callable[[Any], str | None], **content: Any) -> Any:
        import requests

        reason = ""
        for attempt in range(self.manners.max_attempts):
            self._keep_rate()
            self.requests += 1
            asked: float | None = None
            try:
                answer = self._session.request(method, url, timeout=self.manners.timeout, **content)
                asked = retry_after(answer.headers.get("Retry-After"))
                if answer.status_code in RETRIED:
                    reason = f"HTTP {answer.status_code}"
                elif not answer.ok or answer.is_redirect:
                    raise RefusedError(self._refusal(url, answer), answer.status_code)
                else:
                    decoded = answer.json()
                    waiting = busy(decoded)
                    if waiting is None:
                        return decoded
                    reason = waiting
            except requests.exceptions.JSONDecodeError:
                reason = "an answer that is not JSON"
            except (
                requests.exceptions.ConnectionError,
                requests.exceptions.Timeout,
                requests.exceptions.ChunkedEncodingError,
                requests.exceptions.ContentDecodingError,
            ) as error:
                reason = type(error).__name__
            except requests.exceptions.RequestException as error:
                raise UserError(self._clean(f"{url}: {' '.join(str(error).split())[:200]}")) from None
            if attempt + 1 < self.manners.max_attempts:
                self._wait(url, reason, asked, attempt)
        raise UserError(
            self._clean(
                f"{url}: {reason}, {self.manners.max_attempts} times; what was done is kept: "
                "run the same command later to go on"
            )
        )

    def _wait(self, url: str, reason: str, asked: float | None, attempt: int) -> None:
        longest = self.manners.longest_wait
        seconds = min(self.manners.first_wait * 2**attempt, longest) if asked is None else asked
        if seconds > 10 * longest:
            raise UserError(
                self._clean(f"{url}: {reason}, and asks to wait {seconds:.0f} s: run the same command then")
            )
        self.retries[reason] += 1
        logger.info("%s: %s, waiting %.1f s", self._clean(url), reason, seconds)
        self._sleep(seconds)

    def _keep_rate(self) -> None:
        now = self._clock()
        if now < self._next:
            self._sleep(self._next - now)
        self._next = max(now, self._next) + 1 / self.manners.requests_per_second

    def _refusal(self, url: str, answer: Any) -> str:
        words = " ".join(answer.text.split())[:200]
        return self._clean(f"{url}: HTTP {answer.status_code} {answer.reason} ({words})")

    def _clean(self, message: str) -> str:
        for secret in self._secrets:
            message = message.replace(secret, "[key]")
        return message


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: a number or a date); None if there is none."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - (now or datetime.now(timezone.utc))).total_seconds())
