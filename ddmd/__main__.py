"""`python -m ddmd` is the command `ddmd`."""

from ddmd.cli import main

main()
