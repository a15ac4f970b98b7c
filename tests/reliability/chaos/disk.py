"""A disk that is full for a while."""

from tests.integration.usage.conftest import fill, mounted_disk
from tests.reliability.chaos.history import read_records
from tests.reliability.chaos.kills import fast_card
from tests.reliability.chaos.scene import NOT_SERVING, SERVING, Scene
from tests.reliability.chaos.traffic import traffic

NO_DISK = "UNAVAILABLE USAGE_UNAVAILABLE"
ROUNDS = 3
MEGABYTES = 64  # a server does not start with less than 51


async def play_full_disk(scene: Scene) -> None:
    """A full disk: new calls are rejected, readiness changes, and calls that end keep their records."""
    with mounted_disk(scene.folder / "disk", MEGABYTES) as disk:
        filler = disk / "filler"
        server = await scene.start(disk, "--card", str(fast_card(scene.folder)), "--weights", "demo")
        async with traffic(server.address, scene.draw) as running:
            for _ in range(ROUNDS):
                await running.completed(scene.draw.randrange(5, 20))
                fill(filler)
                await scene.health(running.channel, NOT_SERVING)
                await scene.health(running.channel, SERVING, "liveness")
                await running.failed(NO_DISK, 5)
                filler.unlink()
                await scene.health(running.channel, SERVING)
            await running.completed(20)
        await scene.stop(server)
        scene.check_records(disk, running.history)
        scene.check_statuses(running.history, NO_DISK)
        records = len(read_records(disk))
        rejected = running.history.failures[NO_DISK]
        scene.figures.append(f"{ROUNDS} times full, {records} records, {rejected} calls rejected")
