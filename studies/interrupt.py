"""How the studies on real weights end at Ctrl-C: with a line, since what is done stays."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a command; end it with code 130 and a hint where it is interrupted."""
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped. Give the same command again to continue.", file=sys.stderr)
        raise SystemExit(130) from None
