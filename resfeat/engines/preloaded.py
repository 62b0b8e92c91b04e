"""What a process of Ray's imports before it is a worker.

An error would end that process before it can say anything. It comes again when the worker is made,
and is told then.
"""

from contextlib import suppress

with suppress(Exception):
    from resfeat.runtimes.importing import keep_pandas_out

    keep_pandas_out()
    import resfeat.engines.actor  # noqa: F401
