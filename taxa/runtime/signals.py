"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C), and SIGUSR1, which SLURM's --signal sends some time before the limit."""

import os
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """A context manager. Between defer() and release() a signal only sets .received, so that the step in hand is finished and saved;
    outside, SIGTERM and SIGINT act as ever, and SIGUSR1, which is no hurry, is kept for defer().

    A second Ctrl-C leaves at once; not under torchrun, which passes the first one on to processes that have it already.
    """

    def __init__(self):
        self.received, self._deferring = None, False

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
        again = self.received == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ
        if number == signal.SIGUSR1 or (self._deferring and not again):
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
