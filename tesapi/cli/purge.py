"""`tesapi purge`: removes tasks that are over from the store, by hand."""

from __future__ import annotations

import asyncio

from tesapi import logs
from tesapi.app import store_of
from tesapi.dispatch.retention import Retention, purge
from tesapi.errors import ConfigurationProblem, StoreInUse
from tesapi.settings import Settings


def run(settings: Settings, retention: Retention, *, dry_run: bool) -> str:
    """Remove what is not to stay; a sentence for the operator. Raises TesapiError."""
    logs.set_up(settings.logging.level, output_json=settings.logging.output_json)
    if settings.db.mongodb_uri is None and not settings.sqlite_path.exists():
        raise ConfigurationProblem(f"There is no database at {settings.sqlite_path} (db.sqlite_path).")
    try:
        count = asyncio.run(_purged(settings, retention, dry_run=dry_run))
    except StoreInUse as error:
        raise StoreInUse(
            f"{error} So stop the service before purging, or have it purge by itself (retention.max_age_days,"
            " retention.max_tasks)."
        ) from error
    return f"{count} tasks {'would be' if dry_run else 'were'} removed."


async def _purged(settings: Settings, retention: Retention, *, dry_run: bool) -> int:
    async with store_of(settings) as store:
        if dry_run:
            return await store.purgeable(before=retention.before, keep=retention.keep)
        return await purge(store, retention)
