"""Nothing here is about RLHF, and no equation names it: flags, files, logs, the screen."""

import sys


def _hook(kind, error, trace):
    """Ctrl-C while the libraries load, which takes seconds, is no reason for a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _hook
