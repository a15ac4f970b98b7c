"""The file system of a directory: SQLite's shared memory and locks are not safe on a network file system."""

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
"""The mounted file systems on Linux; on another system, no file system is recognized."""
NETWORK_FILE_SYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "ceph", "lustre", "gpfs", "beegfs", "pvfs2"),
        *("fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.sshfs", "fuse.rclone", "fuse.davfs", "fuse.davfs2"),
        *(
            "fuse.s3fs",
            "fuse.gcsfuse",
            "fuse.mount-s3",
            "fuse.goofys",
            "fuse.blobfuse",
            "fuse.blobfuse2",
            "fuse.juicefs",
        ),
    }
)
_ESCAPED = re.compile(r"\\([0-7]{3})")


def network_file_system(directory: Path) -> str | None:
    """Return the type of the network file system that has the directory, such as nfs4; None for a local one."""
    try:
        mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    path = directory.resolve()
    found = max(
        (
            (len(point.parts), number, kind)
            for number, (point, kind) in enumerate(map(_mount, mounts))
            if path.is_relative_to(point)
        ),
        default=(0, 0, ""),
    )[2]  # of the mounts at one directory, the last one is visible
    return found if found in NETWORK_FILE_SYSTEMS else None


def _mount(line: str) -> tuple[Path, str]:
    """Return the directory and the type of a line of `mountinfo`."""
    before, _, after = line.partition(" - ")
    point = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])
    return Path(point), after.split(" ")[0]
