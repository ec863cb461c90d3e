"""Where training runs: devices of this machine, or the processes that torchrun or SLURM started.

Nothing heavy is imported before it is needed, so that a command can ask for its rank cheaply.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rsosm_cli.errors import UsageError
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.training.relay import Listener, Relay
from rsosm_cli.training.stop import Stop

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import ClusterEnvironment

Accelerator = Literal["cpu", "cuda", "mps"]
Launcher = Literal["none", "spawn", "torchrun", "slurm"]

_DEVICE = {"cpu": "cpu", "cuda": "cuda:0", "mps": "mps"}


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


def run(devices: Devices, precision: str, function: Callable[..., Any], *args: Any, progress: Progress = SILENT) -> Any:
    """Run ``function(fabric, progress, *args)`` in one process a device; return what rank 0 of this machine returned.

    Processes of one machine are spawned, so ``function`` and ``args`` must be picklable and importable; their progress,
    log and errors come back. Under torchrun and SLURM the processes are there already and join.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if devices.launcher == "none":
        return function(_fabric(devices, precision, None), progress, *args)
    if devices.launcher == "spawn":
        return _spawn(_fabric(devices, precision, LightningEnvironment()), progress, function, *args)
    if devices.launcher == "torchrun":
        fabric = _fabric(devices, precision, TorchElasticEnvironment())
    else:
        # `sbatch --ntasks` does not export it, and Lightning only wants it against typos.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices.count))
        fabric = _fabric(devices, precision, SLURMEnvironment(auto_requeue=False))
    fabric.launch()
    _share_cores(devices.count, fabric.device.type)
    if fabric.global_rank > 0:
        logging.getLogger("rsosm").setLevel(logging.ERROR)
    return function(fabric, progress if fabric.global_rank == 0 else SILENT, *args)


def _fabric(devices: Devices, precision: str, environment: ClusterEnvironment | None) -> Fabric:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

    _hush()
    strategy: Strategy | str
    if environment is None:
        strategy = SingleDeviceStrategy(_DEVICE[devices.accelerator])
    else:
        strategy = DDPStrategy(
            cluster_environment=environment,
            process_group_backend="nccl" if devices.accelerator == "cuda" else "gloo",
            start_method="spawn" if devices.launcher == "spawn" else "popen",
        )
    with warnings.catch_warnings():
        # Lightning advises on srun and on devices that lie idle; what was asked for has been checked by `choose`.
        warnings.filterwarnings("ignore", module=r"lightning")
        return Fabric(
            accelerator=devices.accelerator,
            devices=devices.count,
            num_nodes=devices.nodes,
            strategy=strategy,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
        )


def _spawn(fabric: Fabric, progress: Progress, function: Callable[..., Any], *args: Any) -> Any:
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").Queue()
    failure: BaseException | None = None
    # The processes finish their step and save; this one waits for them.
    stop = Stop(forward=True)
    with Listener(queue, progress) as listener, stop.listening():
        try:
            fabric.launch(_Child(Relay(queue), function, args))
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            failure = error
    if stop.asked:
        raise KeyboardInterrupt
    if listener.error is not None:
        raise listener.error from None
    if failure is not None:
        raise failure
    return listener.result


class _Child:
    """What a spawned process runs; a class, because Lightning takes the frozen dataclasses of plain arguments apart."""

    def __init__(self, relay: Relay, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.relay, self.function, self.args = relay, function, args

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _hush()  # unpickled in the child, before Lightning has anything to say

    def __call__(self, fabric: Fabric) -> None:
        speaks = fabric.global_rank == 0
        _share_cores(fabric.world_size, fabric.device.type)
        with self.relay.attached(speaks=speaks):
            result = self.function(fabric, self.relay if speaks else SILENT, *self.args)
            if speaks:
                # Lightning's own way back blocks on results larger than a pipe's buffer.
                self.relay.queue.put(("result", result))
        # Nothing may be on its way when the parent goes on.
        self.relay.queue.close()
        self.relay.queue.join_thread()


def _hush() -> None:
    """Lightning's messages are about its own start-up; ours say what runs where."""
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def _share_cores(processes: int, device: str) -> None:
    """Let the processes of one machine share its cores, unless the user's OMP_NUM_THREADS says how."""
    import torch

    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
