"""``bn.env``: versions, devices and backends of this installation."""

import importlib.metadata
import platform
from typing import Any

import torch

from batchnorm.ops.backends.choice import BACKENDS, PROMISES, UNAVAILABLE
from batchnorm.version import __version__

PACKAGES = ("torch", "triton", "numpy", "matplotlib", "rich", "safetensors")


def env() -> dict[str, Any]:
    """Return versions, devices and backends, and why a backend is not available.

    Returns:
        ``python``, ``machine``, ``threads``, ``packages`` (name -> version or None), ``cuda``
        (device names), ``backends`` (name -> "available" or the reason why not), ``promises`` (name
        of a backend -> what it guarantees).
    """
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "packages": {"batchnorm": __version__, **{name: _version(name) for name in PACKAGES}},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "backends": {**dict.fromkeys(BACKENDS, "available"), **UNAVAILABLE},
        "promises": {name: PROMISES[name] for name in BACKENDS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
