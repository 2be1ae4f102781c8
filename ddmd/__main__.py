"""`python -m ddmd` is the command `ddmd`."""

from ddmd.cli import main

if __name__ == "__main__":
    main()
