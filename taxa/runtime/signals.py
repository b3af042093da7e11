"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C), and SIGUSR1.

SLURM's --signal sends SIGUSR1 some time before the time limit.
"""

import os
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """A context manager that defers the signals of STOPPING.

    Between defer() and release() a signal only sets .received, so that the current step is
    finished and saved. Outside, SIGTERM and SIGINT act as usual, and SIGUSR1, which is not urgent,
    is kept for defer().

    A second Ctrl-C leaves at once; but not under torchrun, which passes the first one on to
    processes that have it already.
    """

    def __init__(self):
        self.received = None
        self._deferring = False

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self):
        self._deferring = True

    def release(self):
        self._deferring = False

    @property
    def name(self):
        return signal.Signals(self.received).name if self.received else "a signal"

    def _handle(self, number, frame):
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        again = self.received == number == signal.SIGINT and not under_torchrun
        if number == signal.SIGUSR1 or (self._deferring and not again):
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
