"""Runs a command and fails if its largest resident set passes a limit: peak_memory.py MEBIBYTES COMMAND..."""

import resource
import subprocess
import sys

limit, command = int(sys.argv[1]), sys.argv[2:]
status = subprocess.run(command).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
print(f"peak memory {peak:,} MiB (limit {limit:,} MiB)", flush=True)
sys.exit(status or peak > limit)
