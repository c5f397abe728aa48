"""Runs a job file: `ray job submit --working-dir . -- python jobs/compress.py job.yaml [--set key=value]`."""

import sys

from raycomp.cli import main

main(["run", *sys.argv[1:]], prog_name="jobs/compress.py")
