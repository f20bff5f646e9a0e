"""The commands, one module a family; importing this declares them all."""

from stillframe.monitor.commands import (  # noqa: F401
    block,
    block_job,
    create,
    exports,
    human,
    internal_snapshots,
    introspection,
    job,
    machine,
    migration,
    parts,
    program,
    replay,
    snapshots,
    transaction,
    yank,
)
