"""`python -m studies.testbed`."""

from studies.testbed.rich.command import main

if __name__ == "__main__":
    main()
