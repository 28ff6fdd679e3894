"""The states of a node in a run."""

__all__ = [
    "CACHED",
    "DONE",
    "FAILED",
    "FINISHING",
    "GATHERED",
    "INTERRUPTED",
    "JOINED",
    "KEPT",
    "NOT_STARTED",
    "OPEN",
    "PARSING",
    "PREPARING",
    "QUEUED",
    "READY",
    "REPLAYED",
    "RUNNING",
    "SENT",
    "SHARED",
    "SKIPPED",
    "STATES",
    "VALUED",
    "WAITING",
]

# Those below OPEN are transitional, the others final.
WAITING, READY, RUNNING, PREPARING, GATHERED, QUEUED, SENT, PARSING, JOINED, OPEN = range(10)
DONE, KEPT, SHARED, REPLAYED, CACHED = range(10, 15)
FAILED, SKIPPED, INTERRUPTED, NOT_STARTED = range(15, 19)
#: The final states of nodes that have a value.
VALUED = (DONE, KEPT, SHARED, REPLAYED, CACHED)
#: Added to the rank of work that finishes a paid call, so that it precedes all new work.
FINISHING = 1 << 40
STATES = {
    DONE: "done",
    KEPT: "kept",
    SHARED: "shared",
    REPLAYED: "replayed",
    CACHED: "cached",
    FAILED: "failed",
    SKIPPED: "skipped",
    INTERRUPTED: "interrupted",
    NOT_STARTED: "not_started",
}
