"""Where training runs: devices of this machine, or the processes that torchrun or SLURM started.

Nothing heavy is imported before it is needed, so that a command can ask for its rank cheaply.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rsosm_cli.errors import UsageError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Accelerator = Literal["cpu", "cuda", "mps"]
Launcher = Literal["none", "spawn", "torchrun", "slurm"]


@dataclass(frozen=True)
class Devices:
    """``count`` devices on each of ``nodes`` machines, one process a device."""

    accelerator: Accelerator
    count: int
    nodes: int
    launcher: Launcher

    @property
    def world(self) -> int:
        return self.count * self.nodes

    def __str__(self) -> str:
        what = {"cpu": "CPU", "cuda": "GPU", "mps": "Apple GPU"}[self.accelerator]
        text = f"{self.count} {what}" + (" processes" if self.accelerator == "cpu" and self.count > 1 else "")
        return text + (f" on each of {self.nodes} nodes" if self.nodes > 1 else "")


def external_launcher() -> Launcher:
    """Return who started this process as one of several: ``torchrun``, ``slurm`` (through srun), or ``none``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return "slurm"
    return "none"


def process_rank() -> int:
    """Return the rank that torchrun or SLURM gave this process; 0 where neither did."""
    name = {"torchrun": "RANK", "slurm": "SLURM_PROCID"}.get(external_launcher())
    return int(os.environ[name]) if name else 0


def choose(*, gpus: int | None, nodes: int = 1, device: str = "auto") -> Devices:
    """Return the devices that ``--gpus``, ``--nodes`` and ``--device`` ask for, checked against what is there.

    With ``device="cpu"``, ``gpus`` is the number of CPU processes. Raises :class:`UsageError`.
    """
    import torch

    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus {gpus} is not a number of devices.", hint="Give 1 or more, or --device cpu.")
    if nodes < 1:
        raise UsageError(f"--nodes {nodes} is not a number of machines.", hint="Give 1 or more.")
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"There is no device {device!r}.", hint="Known: auto, cpu, cuda, mps.")
    accelerator = _accelerator(device, gpus)
    launcher = external_launcher()
    count = gpus or 1
    if launcher != "none":
        count, nodes = _started(launcher, gpus, nodes)
    elif nodes > 1:
        raise UsageError(
            f"--nodes {nodes} needs a launcher that starts a process a device on every machine.",
            hint="Use torchrun or srun: docs/cluster.md has both.",
        )
    else:
        launcher = "spawn" if count > 1 else "none"
    there = torch.cuda.device_count() if accelerator == "cuda" else 1 if accelerator == "mps" else count
    if count > there:
        raise UsageError(
            f"--gpus {count} is more than this machine has: {there}.",
            hint="Lower it, or use --device cpu.",
            asked=count,
            there=there,
        )
    return Devices(accelerator, count, nodes, launcher)


def _accelerator(device: str, gpus: int | None) -> Accelerator:
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "cpu":
        return "cpu"
    if device == "cuda" or (device == "auto" and cuda):
        if not cuda:
            raise UsageError("--device cuda: this machine has no CUDA device.", hint="Use --device cpu.")
        return "cuda"
    if device == "mps" or (device == "auto" and mps):
        if not mps:
            raise UsageError("--device mps: this machine has no Apple GPU.", hint="Use --device cpu.")
        return "mps"
    if gpus is not None:
        raise UsageError(
            f"--gpus {gpus} is more than this machine has: 0.",
            hint=f"Leave --gpus out, or run {gpus} CPU process{'es' if gpus > 1 else ''} with --device cpu.",
            asked=gpus,
            there=0,
        )
    return "cpu"


def _started(launcher: Launcher, gpus: int | None, nodes: int) -> tuple[int, int]:
    """Return (processes a node, nodes) of the launcher; what the user says must agree."""
    env = os.environ
    if launcher == "torchrun":
        count = int(env["LOCAL_WORLD_SIZE"])
        machines = int(env["WORLD_SIZE"]) // count
    else:
        machines = int(env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", "1")))
        count = int(env["SLURM_NTASKS"]) // machines
    if gpus is not None and gpus != count:
        raise UsageError(
            f"--gpus {gpus}, but {launcher} started {count} processes on each machine.",
            hint="Let both say the same, or leave --gpus out.",
        )
    if nodes not in (1, machines):
        raise UsageError(
            f"--nodes {nodes}, but {launcher} started processes on {machines}.",
            hint="Let both say the same, or leave --nodes out.",
        )
    return count, machines


def run(devices: Devices, precision: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(fabric, *args)`` in one process a device; return what rank 0 (of this machine) returned.

    Processes of one machine are spawned, so ``function`` and ``args`` must be picklable and importable. Under
    torchrun and SLURM the processes are there already and join.
    """
    import warnings

    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, Strategy

    kind = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}[devices.accelerator]
    strategy: str | Strategy = "auto"
    plugins: list[Any] = []
    if devices.launcher in ("torchrun", "slurm"):
        if devices.launcher == "slurm":
            # `sbatch --ntasks=2` does not export it; the check that wants it is one about typos.
            os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices.count))
        environment = TorchElasticEnvironment() if devices.launcher == "torchrun" else SLURMEnvironment(False)
        strategy = DDPStrategy(cluster_environment=environment, process_group_backend=_backend(devices))
    elif devices.launcher == "spawn":
        strategy = DDPStrategy(
            cluster_environment=LightningEnvironment(),
            process_group_backend=_backend(devices),
            start_method="spawn",
        )
    fabric: Fabric
    with warnings.catch_warnings():
        # Lightning advises on srun and on idle GPUs; what was asked for has been checked above.
        warnings.filterwarnings("ignore", module=r"lightning")
        fabric = Fabric(
            accelerator=kind,
            devices=devices.count,
            num_nodes=devices.nodes,
            strategy=strategy,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            plugins=plugins,
        )
        if devices.launcher == "spawn":
            return fabric.launch(function, *args)
        fabric.launch()
    return function(fabric, *args)


def _backend(devices: Devices) -> str:
    return "nccl" if devices.accelerator == "cuda" else "gloo"
