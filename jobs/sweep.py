"""Runs a sweep file: `ray job submit --working-dir . -- python jobs/sweep.py sweep.yaml`."""

import sys

from raycomp.cli import main

main(["sweep", *sys.argv[1:]], prog_name="jobs/sweep.py")
