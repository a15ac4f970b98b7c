"""Recorded requests and replies for a replay: two edits, a rewrite, and a reply that repeats nothing of its request."""

_LETTER = """Dear Ms. Alvarez, thank you for your order of March 3. The two oak shelves left our workshop on
Monday and should arrive within five working days. The third shelf is still in the drying room,
because the wood was too wet to be cut. We expect to send it on March 17, at no extra cost. If you
would rather wait and receive all three together, please write to us before Friday. We are sorry for
the delay, and we hope that the shelves will serve you for many years. With kind regards, the
workshop."""

_CODE = """def mean_speed(distances, times):
    total_distance = 0.0
    total_time = 0.0
    for distance, time in zip(distances, times):
        if time <= 0:
            raise ValueError("a time must be above zero")
        total_distance += distance
        total_time += time
    return total_distance / total_time


def fastest(distances, times):
    speeds = [distance / time for distance, time in zip(distances, times)]
    return max(range(len(speeds)), key=lambda index: speeds[index])
"""

_ARTICLE = """The harbor was built in 1843 for the trade in salt and timber. For forty years it was the largest on
the coast, until the railway reached the town and the ships became fewer. Today the old warehouses
hold a museum, a library and a market hall. The museum shows how salt was won from the sea, with
pans and tools that the families of the town have given. On the first Sunday of each month, a steam
crane from 1887 still lifts barrels for the visitors."""

_STORY = """Mira had never seen snow before the winter in which she turned nine. She pressed her nose against
the cold window and watched the first flakes drift past the lamp. Her grandmother laughed and
wrapped a blue scarf around her neck twice. Outside, every step made a sound like dry leaves. A fox
crossed the road without hurry, looked back once, and was gone behind the barn. Mira decided that
tomorrow she would follow its tracks."""

RECORDED = {
    "edit of a letter": (
        f"Correct the date: the third shelf is sent on March 21, and change Friday to Thursday.\n\n{_LETTER}\n\n",
        _LETTER.replace("March 17", "March 21").replace("Friday", "Thursday"),
    ),
    "edit of a program": (
        f"Rename times to durations and time to duration.\n\n{_CODE}\n\n",
        _CODE.replace("total_time", "total_duration").replace("times", "durations").replace(" time", " duration"),
    ),
    "rewrite of an article": (
        f"Rewrite this text in the present tense where possible, and leave out the last sentence.\n\n{_ARTICLE}\n\n",
        """The harbor dates from 1843, when it was built for the trade in salt and timber. For forty years it
was the largest on the coast. Then the railway reached the town and the ships became fewer. Today
the old warehouses hold a museum, a library and a market hall. The museum shows how salt is won from
the sea, with pans and tools that the families of the town have given.""",
    ),
    "unrelated story": (f"Write a story about a girl and the first snow. Do not use this text:\n\n{_CODE}\n\n", _STORY),
}
"""By name: a request, and its reply. The replies were written by hand."""
