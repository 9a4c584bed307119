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
        self.start_time, self.shown = None, time.monotonic()

    def add(self, amount=1):
        """Count `amount` more units; print if the last line is old enough."""
        self.done += amount
        if self.start_time is None:  # until now processes were starting: no part of the rate
            self.start_time, self.done_before = time.monotonic(), self.done
        if time.monotonic() - self.shown > _EVERY:
            self.show()

    def show(self):
        """Print the line now."""
        self.shown = time.monotonic()
        rate = (self.done - self.done_before) / max(self.shown - (self.start_time or 0), 1e-3)
        eta = f"{(self.total - self.done) / rate / 60:,.1f} min" if rate else "unknown"
        share = self.done / max(self.total, 1)
        print(f"{self.name}: {self.done:,.0f} of {self.total:,.0f} {self.unit} ({share:.0%}), "
              f"{rate:,.1f} {self.unit}/s, eta {eta}", flush=True)
