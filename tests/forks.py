"""Processes and notebook kernels forked from one process that has imported what takes long.

A kernel of its own imports torch and transformer_lens for 10 to 20 seconds, often longer than its cells run.
A forked one has them in memory, and starts as fresh otherwise: own environment, folder and globals.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from c2r_core.notebook.runner import KERNEL_ENVIRONMENT

PRELOADED = [
    "ipykernel.kernelapp",
    "pandas",
    "scipy.stats",
    "sklearn.linear_model",
    "torch._dynamo",  # the first step of an optimiser imports it
    "transformer_lens.model_bridge",
]
"""Not ours, whose imports are under test; not matplotlib, which settles on import how figures are shown."""

CAN_FORK = sys.platform == "linux"
"""Elsewhere the system's libraries have threads that do not survive it."""
CONTEXT: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
CONTEXT.set_forkserver_preload(PRELOADED)


def forked(
    target: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """A process, not started yet, with an environment: None is that which this one has now."""
    with pytest.MonkeyPatch.context() as patch:  # tqdm, say, reads its own when it is imported
        for name, value in KERNEL_ENVIRONMENT.items():
            patch.setenv(name, value)
        if CAN_FORK:
            forkserver.ensure_running()
    return CONTEXT.Process(target=_call, args=(dict(environment or os.environ), target, arguments))


def fork_kernels() -> None:
    """From now on every kernel that this process starts is forked."""
    if CAN_FORK:
        factory = KernelProvisionerFactory.instance()
        factory.provisioners["forked"] = EntryPoint(
            "forked", f"{__name__}:ForkedKernel", factory.GROUP_NAME
        )
        factory.default_provisioner_name = "forked"


class ForkedKernel(LocalProvisioner):
    """What starts a kernel, watches it and ends it."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Fork a kernel. `cmd` starts a new one: python, its options, -m ipykernel_launcher, arguments."""
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.cwd = kwargs.get("cwd") or os.getcwd()
        process = forked(run_kernel, arguments, self.cwd, environment=kwargs["env"])
        process.start()
        self.process, self.pid = AsPopen(process), process.pid
        return self.connection_info


class AsPopen:
    """A process with the part of `subprocess.Popen` that jupyter_client uses."""

    stdin = stdout = stderr = None

    def __init__(self, process: Any) -> None:
        self.process = process
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def _call(
    environment: Mapping[str, str], target: Callable[..., None], arguments: Iterable[Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def run_kernel(arguments: list[str], folder: str) -> None:
    """Be a kernel, in a folder, until it is told to end."""
    from ipykernel.kernelapp import IPKernelApp

    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # it ends when what forked it does
    os.chdir(folder)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    IPKernelApp.launch_instance(argv=arguments)
