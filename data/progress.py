"""The line that says how far a long job is: downloads, conversions, packing."""
import sys
import time

_EVERY = 0.5 if sys.stdout.isatty() else 10.0  # seconds between lines; a log file gets fewer


class Progress:
    """Counts units of work and prints "done of total, rate, time left" now and then.

    name: what is being done; total: units in all; unit: its name in the line.
    done: units that an earlier run has finished already; they do not count in the rate.
    """

    def __init__(self, name, total, unit, done=0):
        self.name, self.total, self.unit = name, total, unit
        self.done = self.done_before = done
        self.start_time = self.shown = time.monotonic()

    def add(self, amount=1):
        """Count `amount` more units; print if the last line is old enough."""
        self.done += amount
        if time.monotonic() - self.shown > _EVERY:
            self.show()

    def show(self):
        """Print the line now."""
        self.shown = time.monotonic()
        rate = (self.done - self.done_before) / max(self.shown - self.start_time, 1e-3)
        left = (self.total - self.done) / rate if rate else float("inf")
        eta = f"eta {left / 60:,.1f} min" if left < float("inf") else "eta unknown"
        share = self.done / max(self.total, 1)
        print(f"{self.name}: {self.done:,.0f} of {self.total:,.0f} {self.unit} ({share:.0%}), "
              f"{rate:,.1f} {self.unit}/s, {eta}", flush=True)
