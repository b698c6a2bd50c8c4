"""`python -m studies.testbed`."""

from studies.testbed.command import main

if __name__ == "__main__":
    main()
