"""`tenants.yaml` in the home (ADAPTFLEET_TENANTS names another): the policies of tenants, in force within about a second of a change."""

import logging
import os
import time
from pathlib import Path

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.loading import load_contract
from adaptfleet.contracts.tenants import TenantsSpec

VARIABLE = "ADAPTFLEET_TENANTS"
_RECHECK_S = 1.0

log = logging.getLogger(__name__)


def policy_file() -> Path:
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else home() / "tenants.yaml"


def read_policies(file: Path | None = None) -> TenantsSpec:
    """ContractError lists all that is wrong. Without a file, every tenant has the defaults."""
    file = file or policy_file()
    return load_contract(TenantsSpec, file) if file.exists() or os.environ.get(VARIABLE) else TenantsSpec()


class PolicyFile:
    """The policies now. After a broken edit, or without its file, the last good ones stay in force, and the log says so."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or policy_file()
        self._stamp = self._look()
        self._policies = read_policies(self._file)
        self._checked_at = time.monotonic()

    @property
    def now(self) -> TenantsSpec:
        at = time.monotonic()
        if at - self._checked_at >= _RECHECK_S:
            self._checked_at = at
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._read_again()
        return self._policies

    def _read_again(self) -> None:
        if self._stamp is None:
            log.error("%s went away; the policies stay as they were. To have none, leave an empty file there.", self._file)
            return
        try:
            self._policies = read_policies(self._file)
            log.info("%s: the policies in it are in force.", self._file)
        except ContractError as error:
            log.error("the policies stay as they were: %s", error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
