"""`python -m raycomp` is the command line."""

from raycomp.cli import main

main(prog_name="raycomp")
