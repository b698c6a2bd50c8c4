"""`python -m trl_vpo`: the command line."""

import sys

from trl_vpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
