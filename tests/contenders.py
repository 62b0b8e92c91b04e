"""Processes that want the lease of one dataset, as if each were on a machine of its own.

    with Contenders(3, environment) as contenders:
        rounds = contenders.play("s3://bucket/out", seed=1)  # by now some were paused

Each tries to get the lease, holds it for a while and gives it up, again and again. Meanwhile one,
mostly the holder, is stopped by SIGSTOP, and goes on later. What a holder trusted, and what it saw,
comes back as `Hold`s.
"""

import multiprocessing
import os
import random
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

from obstore.exceptions import BaseError

SECONDS = 1.2  # of a round
# Far apart enough for a busy machine, which then only loses the lease more often.
TIMES = {
    "BEAT_SECONDS": 0.05, "LEASE_SECONDS": 0.25, "STALE_SECONDS": 0.35, "LOOK_SECONDS": 0.03,
}  # fmt: skip


@dataclass
class Hold:
    """What one holder had of the lease.

    first, last: the moments, on the clock of all processes here, from which on the first and the
    last of its checks were made that passed; in between it was the holder. strange: what it found
    in the plan between its own writing and a check that passed. lost: whether a check failed.
    """

    who: int
    first: float = 0.0
    last: float = 0.0
    checks: int = 0
    lost: bool = False
    strange: bytes | None = None


class Contenders:
    def __init__(self, count, environment, straight):
        """straight: the environment in which the store is reached without faults."""
        self._count, self._environments = count, (environment, straight)

    def __enter__(self):
        self._stack = ExitStack()
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        self._holder = context.Value("i", -1, lock=False)  # who held it last
        for who in range(self._count):
            ours, theirs = context.Pipe()
            about = (who, theirs, self._holder, *self._environments)
            process = context.Process(target=_contend, args=about)
            process.start()
            self._stack.callback(process.join)
            self._stack.callback(process.kill)
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"
        return self

    def __exit__(self, *_):
        self._stack.close()

    def play(self, output, seed):
        """One round; gives the holds of all, by the time of their first check."""
        chance, self._holder.value = random.Random(seed), -1
        for pipe in self._pipes:
            pipe.send((output, chance.random()))
        until = time.monotonic() + SECONDS
        time.sleep(chance.uniform(0.0, 0.3 * SECONDS))
        while self._holder.value < 0 and time.monotonic() < until:
            time.sleep(0.001)
        whom = self._holder.value if chance.random() < 0.8 else chance.randrange(self._count)
        pid = self._processes[whom].pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.0, 3 * TIMES["STALE_SECONDS"]))
        os.kill(pid, signal.SIGCONT)
        holds = [hold for pipe in self._pipes for hold in pipe.recv()]
        return sorted(holds, key=lambda hold: hold.first)


def _contend(who, pipe, holder, environment, straight):
    from resfeat.dataset import Layout, lease
    from resfeat.dataset.writer import Writer
    from resfeat.errors import ResfeatError
    from resfeat.storage import remote

    for name, value in TIMES.items():
        setattr(lease, name, value)
    hurry(remote)
    me = replace(Writer.me(), machine=f"machine {who}")
    Writer.me = lambda: replace(me, token=random.randbytes(8).hex())
    pipe.send("ready")
    while True:
        output, seed = pipe.recv()
        chance, until, holds = random.Random(seed), time.monotonic() + SECONDS, []
        os.environ.update(environment)
        remote.store.cache_clear()
        layout = Layout(output)
        plan = layout.plan / "plan-00000.parquet"
        reader = _straight(remote, straight, plan)
        while time.monotonic() < until:
            time.sleep(chance.uniform(0, 0.1))
            hold = Hold(who)
            try:
                with lease.held_in_store(layout, Writer.me(), True, print) as held:
                    holds.append(hold)
                    holder.value = who
                    _hold(hold, held, layout, plan, reader, chance.uniform(0, 0.8))
            except ResfeatError:
                hold.lost = True
        pipe.send([hold for hold in holds if hold.checks])


def _hold(hold, held, layout, plan, reader, seconds):
    """Write a plan, and see that it stays for as long as the lease is ours."""
    until = time.monotonic() + seconds
    mine = held.token.encode()
    _checked(hold, held)
    layout.fence.write(plan, mine)
    while True:
        seen, is_over = reader(), time.monotonic() > until
        _checked(hold, held)
        if seen not in (mine, None):
            hold.strange = seen
        if is_over:
            return
        time.sleep(0.01)


def _checked(hold, held):
    now = time.monotonic()
    held.check()
    hold.first, hold.last, hold.checks = hold.first or now, now, hold.checks + 1


def _straight(remote, environment, path):
    """What reads an object past the proxy. It gives None where it could not, for it was stopped."""
    before = dict(os.environ)
    os.environ.update(environment)
    client = remote.store.__wrapped__(path.root)
    os.environ.clear()
    os.environ.update(before)

    def read():
        try:
            return bytes(client.get(path.key).bytes())
        except FileNotFoundError:
            return b"nothing"
        except BaseError:
            return None

    return read


def hurry(remote):
    """Have requests given up soon."""
    remote.REQUEST_SECONDS = 0.3
    remote.RETRY_SECONDS = 1
    remote.ATTEMPTS = 3
    remote.PAUSE_SECONDS = 0.02
