"""Stands in for `lvlm` where several processes are started: joins the group and adds up what each process brings."""

import json
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

jax.config.update("jax_cpu_collectives_implementation", "gloo")
if os.environ.get("LVLM_DISTRIBUTED"):
    jax.distributed.initialize()
else:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, processes, process = (os.environ[name] for name in names)
    jax.distributed.initialize(address, int(processes), int(process))
total = int(np.sum(multihost_utils.process_allgather(np.int32(10 ** jax.process_index()))))
devices = [jax.local_device_count(), jax.device_count()]
row = {"process": jax.process_index(), "total": total, "devices": devices, "words": sys.argv[1:]}
sys.stdout.write(json.dumps(row) + "\n")  # one write: print makes two where Python does not buffer, and rows would mix
