"""The bench of ideas: always the first caption of a picture, on shards that have several."""


def pick_caption(count, rng):
    return 0
