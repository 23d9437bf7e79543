"""How fast a run trains: since the last logged step, and over all."""

from dataclasses import dataclass

from spikescale.data_pipeline.loader import Loader


@dataclass(frozen=True)
class Speed:
    """Of the steps since the last logged one."""

    seconds_per_step: float
    wait_share: float  # of the time, spent waiting for data


class StepClock:
    """Adds up the time of steps. The first one, which builds kernels and allocates, counts only where it is
    the only one to report."""

    def __init__(self, loader: Loader) -> None:
        self.total_seconds, self.total_steps = 0.0, 0
        self._loader = loader
        self._seconds, self._steps, self._waited = 0.0, 0, loader.wait_seconds
        self._warm = False

    def count(self, seconds: float, logged: bool) -> None:
        """A step took `seconds`; `logged`: it is about to be reported."""
        if self._warm or logged:
            self._seconds += seconds
            self._steps += 1
        if self._warm:
            self.total_seconds += seconds
            self.total_steps += 1
        else:
            self._warm = True
            if not logged:
                self._waited = self._loader.wait_seconds

    def read(self) -> Speed:
        """The speed since the last reading."""
        waited = self._loader.wait_seconds - self._waited
        speed = Speed(self._seconds / self._steps, waited / self._seconds)
        self._seconds, self._steps, self._waited = 0.0, 0, self._loader.wait_seconds
        return speed

    def seconds_per_step(self, latest: Speed) -> float:
        """The mean over all steps; `latest` until there are any that count."""
        return self.total_seconds / self.total_steps if self.total_steps else latest.seconds_per_step
