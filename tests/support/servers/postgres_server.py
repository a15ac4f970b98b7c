"""A real PostgreSQL for tests: a private cluster on a free loopback port."""

import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


class PostgresCluster:
    """A private cluster on a loopback port, or on an address whose network may connect.

    As root, it runs as another user, because PostgreSQL rejects root.
    """

    def __init__(self, programs: Path, address: str = "127.0.0.1") -> None:
        self._address = address
        self._programs = programs
        self._directory = Path(tempfile.mkdtemp(prefix="llama2-ledger-"))
        self._user = _unprivileged_user()
        if self._user:
            shutil.chown(self._directory, self._user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._run(
            "initdb", "--no-sync", "--auth=trust", "--username=ledger", "--locale=C", "--encoding=UTF8", "-D", "data"
        )
        with (self._directory / "data/pg_hba.conf").open("a") as access:
            access.write("host all all samenet trust\n")
        self.start()

    def start(self) -> None:
        """Start the server, and return when it accepts connections."""
        options = f"-c listen_addresses={self._address} -c port={self.port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "start", "--wait", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        """Stop the server at once, like a crash."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate", "-D", "data")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the server."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all processes of the server, and wait for their end; `start` then recovers the data."""
        ends = [os.pidfd_open(pid) for pid in self._processes()]
        self.signal(signal.SIGKILL)
        for end in ends:
            select.select([end], [], [])
            os.close(end)
        # A killed process keeps its number until its parent reads the exit code, which would prevent the next start.
        (self._directory / "data" / "postmaster.pid").unlink()

    def _processes(self) -> list[int]:
        """Return the first process of the server and its children."""
        first = int((self._directory / "data" / "postmaster.pid").read_text().splitlines()[0])
        found = [first]
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # a process that has ended
                # The parent is the second field after the name in parentheses.
                if int(path.read_text().rpartition(")")[2].split()[1]) == first:
                    found.append(int(path.parent.name))
        return found

    def new_database(self) -> str:
        """Create an empty database, and return its URL."""
        name = f"ledger_{uuid.uuid4().hex}"
        self._run("createdb", "-h", self._address, "-p", str(self.port), "-U", "ledger", name)
        return f"postgresql://ledger:s3cret@{self._address}:{self.port}/{name}"

    def remove(self) -> None:
        """Stop the server, unless a test has stopped it, and delete its data."""
        if (self._directory / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._directory)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if self._user:
            # Not the argument `user` of subprocess: it needs fork(), after which a process with gRPC threads can crash.
            group = pwd.getpwnam(self._user).pw_gid
            command = ["setpriv", f"--reuid={self._user}", f"--regid={group}", "--clear-groups", *command]
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        subprocess.run(command, check=True, cwd=self._directory, env=environment, stdout=subprocess.DEVNULL)


def _unprivileged_user() -> str | None:
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def running_postgres(address: str = "127.0.0.1") -> Iterator[PostgresCluster]:
    """Run a cluster for the body of the `with`; skip the test, with the reason, if PostgreSQL is not installed."""
    if PROGRAMS is None:
        pytest.skip("NOT TESTED WITH POSTGRESQL: it is not installed (Debian: apt-get install postgresql)")
    cluster = PostgresCluster(PROGRAMS, address)
    try:
        yield cluster
    finally:
        cluster.remove()
