"""The garbage collector of a process that serves."""

import gc


def calm_collector() -> None:
    """For a process of its own, once it serves: what was imported isn't looked through again, and what requests leave less often.

    By default the collector runs once or twice within each request, and walks through all modules every few hundred.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
