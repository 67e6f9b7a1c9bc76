"""The devices that a training is spread over, in one process or in many; CLUSTER.md says how to start it.

Paper: nothing. All of it is JAX's own runtime: the processes find each other by `jax.distributed`, each draws the tasks
of its own devices, the state is the same on all, and gradients are averaged over all of them (train.py:make_update).
"""

import os
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from scales import BadInput

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # number of processes, as srun and mpirun tell it
PATIENCE = 300  # seconds that a process waits for the others


def join(s) -> int:
    """Join the other processes of this run, if there are any; returns the number of all. To be called before anything
    touches a device. SLURM and Open MPI let JAX find out who is who, with a GPU for each process; --coordinator tells.

    `s` has coordinator, processes and process, of train.py. Raises BadInput for what cannot be. If the others do not
    come in time, JAX itself ends the process.
    """
    processes, known = max(int(os.environ.get(name, 1)) for name in LAUNCHERS), {}
    if s.coordinator:
        processes = s.processes
        known = {"coordinator_address": s.coordinator, "num_processes": processes, "process_id": s.process,
                 "cluster_detection_method": "deactivate"}
        if not (0 <= s.process < processes and s.coordinator.rpartition(":")[2].isdigit()):
            raise BadInput(f"--coordinator {s.coordinator} --processes {processes} --process {s.process}: expected "
                           "host:port, how many processes, and a number from 0 to one less")
    elif s.processes > 1:
        raise BadInput(f"--processes {s.processes}: --coordinator says where they meet")
    if processes > 1:
        print(f"waiting for all {processes} processes of this run, at most {PATIENCE} s", file=sys.stderr, flush=True)
        try:
            jax.distributed.initialize(**known, initialization_timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"JAX does not find the other processes ({str(error).splitlines()[0]}): give --coordinator, "
                           "--processes and --process") from None
    return processes


def use_all_cores(share: int) -> None:
    """Make each CPU core a device of its own, as many as divide `share`. No effect where there is a GPU."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    while share % cores:
        cores -= 1
    jax.config.update("jax_num_cpu_devices", cores)


def shardings() -> tuple[Mesh, NamedSharding, NamedSharding]:
    """All devices of all processes; how the state lies on them, the same on each; and tasks [A, B, ...], B shared."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return mesh, NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))


def own_share(micro_batch: int) -> range:
    """Which tasks of each micro-batch are this process's: those of its devices."""
    each = micro_batch // jax.process_count()
    return range(jax.process_index() * each, (jax.process_index() + 1) * each)


def placed(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays of this process, or its share of them, as arrays over the devices of all processes."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def here(tree: PyTree) -> PyTree:
    """What all devices have, on one device of this process: to look at, or to write, without the others."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
