"""Owner: the process that holds the lock of a run, and whether it is alive."""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tda_lightning.stores.integrity.durable import NO_BLOCK, NO_FOLLOW


@dataclass(frozen=True)
class Owner:
    """The process that writes to a run.

    Attributes:
        host: Name of the machine.
        machine: Identifies the machine since it booted, and the processes that can be seen; empty
            if unknown.
        process: Id of the process.
        born: Identifies the process among those with the same id; empty if unknown.
        run: Id of the run.
        since: Time at which it began to write.
        token: Identifies this one lock.
    """

    host: str
    machine: str
    process: int
    born: str
    run: str
    since: str
    token: str

    @classmethod
    def this_process(cls, run: str) -> Owner:
        """Return this process as the owner of a run, with a new token."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        process, host = os.getpid(), socket.gethostname()
        born, token = _birth_of(process), uuid.uuid4().hex
        return cls(host, _this_machine(), process, born, run, now, token)

    def is_same_process(self, other: Owner) -> bool:
        """Return whether two owners are the same process."""
        return (self.host, self.machine, self.process, self.born) == (
            *(other.host, other.machine, other.process, other.born),
        )

    def describe(self) -> str:
        """Return a short description that identifies the process."""
        return f"process {self.process} on host {self.host!r}, since {self.since}, run {self.run!r}"


def read_owner(file: Path) -> Owner | None:
    """Return the owner that a lock names, or ``None`` if there is no lock, or a damaged one."""
    try:
        descriptor = os.open(file, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
    except OSError:
        return None
    try:
        content = json.loads(os.read(descriptor, 2**12))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(descriptor)
    return Owner(**content) if _is_owner(content) else None


def _is_owner(content: Any) -> bool:
    """Return whether the content of a lock has the fields of an owner, of the right types."""
    if not isinstance(content, dict) or set(content) != {field.name for field in fields(Owner)}:
        return False
    return all(
        isinstance(value, int if name == "process" else str) for name, value in content.items()
    )


def may_be_alive(owner: Owner, this: Owner) -> bool:
    """Return whether an owner may be alive; one on another machine always may."""
    if not owner.machine or owner.machine != this.machine:
        return True
    if owner.born:
        return _birth_of(owner.process) == owner.born
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _this_machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return "" if os.name == "nt" else socket.gethostname()


def _birth_of(process: int) -> str:
    """Return the start time of a living process; empty if it is dead or cannot be seen."""
    with suppress(OSError):
        # The name of the program, in brackets, may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
