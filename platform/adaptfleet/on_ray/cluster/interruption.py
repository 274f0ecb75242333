"""SIGTERM and Ctrl-C leave `with` blocks in order, so that what a command started is stopped."""

import signal


def stop_on_signal() -> None:
    """From here on SIGTERM ends this process as Ctrl-C does: `with` blocks are left in order, so a cluster is stopped."""

    def interrupt(signum: int, frame: object) -> None:
        # A second signal must not cut the stop short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
