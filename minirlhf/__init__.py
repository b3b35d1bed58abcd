"""minirlhf: RLHF from scratch in pure PyTorch, written to be read beside the lectures."""

import sys


def stop_quietly(kind, error, trace) -> None:
    """Ctrl-C while Python still imports: one line in place of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:                       # a command of ours starts, nobody imports us
    sys.excepthook = stop_quietly
