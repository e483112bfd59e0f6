"""What machine, which versions, which commit: the line that every published number carries."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["commit", "machine_info", "versions"]

_PACKAGES = ("sparingly", "torch", "numpy", "numba", "safetensors", "faiss-cpu", "onnxruntime", "triton")


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _physical_cores(cpuinfo: Path = Path("/proc/cpuinfo")) -> int | None:
    """Distinct (socket, core) pairs, None where the system does not say."""
    try:
        blocks = cpuinfo.read_text().split("\n\n")
    except OSError:
        return None
    cores = set()
    for block in blocks:
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in block.splitlines())}
        if "core id" in fields:
            cores.add((fields.get("physical id"), fields["core id"]))
    return len(cores) or None


def _usable_cpus() -> int | None:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_bytes": p.total_memory} for p in properties]


def machine_info() -> dict[str, Any]:
    """JSON-ready machine line: cpu, cores, threads, logical_cpus, memory_bytes, virtual, gpus, os, python.

    ``cores`` are physical, ``logical_cpus`` those this process may use, ``threads`` what PyTorch uses now;
    None where the system does not say. Asks for GPUs, so call it when a result is written, not on import.
    """
    return {
        "cpu": _cpu_model(),
        "arch": platform.machine(),
        "cores": _physical_cores(),
        "logical_cpus": _usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "virtual": _is_virtual(),
        "gpus": _gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def _is_virtual(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """True where the processor says that a hypervisor runs below; None where that cannot be read."""
    try:
        flags = next((x for x in cpuinfo.read_text().splitlines() if x.startswith("flags")), None)
    except OSError:
        return None
    return None if flags is None else "hypervisor" in flags.split()


def versions() -> dict[str, str | None]:
    """Versions of Sparingly and of the packages its numbers depend on; None where not installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def installed() -> dict[str, str]:
    """:func:`versions` without what is not installed."""
    return {name: version for name, version in versions().items() if version}


def commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout that Sparingly runs from, ``-dirty`` when tracked files differ; None outside one."""
    root = folder or Path(__file__).resolve().parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        # An installed copy inside some other project's checkout must not claim that project's commit.
        if not _git(root, "ls-files", "--", "." if folder else str(Path(__file__).resolve())):
            return None
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
