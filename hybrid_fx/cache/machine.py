"""What was measured on a machine, kept beside the plans: one small JSON file a measurement.

A file is read if nobody else can have written it and it names this very machine. Where there is
none that can be read, or none can be written, one measures anew: that takes less than a second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import CacheError
from .private_files import check_owner, make_private, read_own_file, replace_file

logger = logging.getLogger("hybrid_fx")

#: How long each of some ways takes, in seconds, on each of some sizes.
Seconds = dict[str, list[float]]

#: Version of the files.
_FORMAT = 1

#: Environment variables that tell kernels what they may use begin so.
_LIBRARIES = ("ATEN_CPU_", "DNNL_", "MKL_", "ONEDNN_")


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how fast kernels are here.

    Attributes:
        processor: Its model.
        features: Digest of the instructions that the system says it has.
        capability: The instruction set that torch's own kernels use.
        bfloat16: Whether oneDNN's kernels multiply in bfloat16.
        variables: What the environment tells the libraries of kernels.
        threads: Of torch.
        torch: Its version.
    """

    processor: str
    features: str
    capability: str
    bfloat16: bool
    variables: tuple[tuple[str, str], ...]
    threads: int
    torch: str

    @classmethod
    def here(cls) -> Machine:
        """This one, as this process sees it."""
        processor, features = _processor()
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return cls(
            processor=processor,
            features=features,
            capability=torch.backends.cpu.get_cpu_capability(),
            bfloat16=has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
            variables=tuple(
                (name, value)
                for name, value in sorted(os.environ.items())
                if name.startswith(_LIBRARIES) and "VERBOSE" not in name
            ),
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
        )


@functools.cache
def _processor() -> tuple[str, str]:
    """Model and digest of the features of the first processor, as the system names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine(), ""
    lines = (line.partition(":") for line in text.splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    features = said.get("flags", said.get("Features", ""))
    model = said.get("model name", platform.machine())
    return model, hashlib.sha256(features.encode()).hexdigest()[:16]


def file_of(directory: Path, machine: Machine, what: str) -> Path:
    """Where the seconds of ``what`` on a machine are kept."""
    digest = hashlib.sha256(json.dumps([what, asdict(machine)]).encode()).hexdigest()
    return directory / f"{what}-{digest[:16]}.json"


def read_seconds(directory: Path, machine: Machine, what: str) -> Seconds | None:
    """The seconds of ``what`` that are kept for a machine, or None."""
    path = file_of(directory, machine, what)
    try:
        check_owner(os.stat(directory), directory, "directory")
        value = json.loads(read_own_file(path).decode("ascii"))
        if type(value) is not dict or value.get("format") != _FORMAT:
            raise CacheError(f"it is not of format {_FORMAT}")
        if value.get("machine") != _plain(machine):
            raise CacheError("it belongs to another machine")
        return _checked(value.get("seconds"))
    except FileNotFoundError:
        return None
    except (CacheError, OSError, ValueError, RecursionError) as error:
        logger.warning("%s is not used (%s); it is measured again", path, error)
        return None


def write_seconds(directory: Path, machine: Machine, what: str, seconds: Seconds) -> None:
    """Keep the seconds of ``what`` for a machine, if the directory lets us."""
    value = {"format": _FORMAT, "machine": _plain(machine), "seconds": seconds}
    path = file_of(directory, machine, what)
    try:
        make_private(directory)
        check_owner(os.stat(directory), directory, "directory")
        replace_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii"))
    except (CacheError, OSError) as error:
        logger.warning("%s cannot be written (%s); each process measures anew", path, error)


def _plain(machine: Machine) -> object:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(machine)))


def _checked(value: object) -> Seconds:
    if not isinstance(value, Mapping) or not all(map(_are_seconds, value.values())):
        raise CacheError("damaged: no lists of seconds")
    return dict(value)


def _are_seconds(value: object) -> bool:
    return isinstance(value, list) and all(
        type(one) is float and math.isfinite(one) and one > 0 for one in value
    )
