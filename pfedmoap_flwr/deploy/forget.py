"""Nothing of what clients uploaded stays in Flower's database once a run has ended.

Flower 1.42 deletes the messages of a run that ended well. Their bytes stay behind in the
database's journal, and, where SQLite was built so, in its free pages; a killed run leaves the
messages themselves.
"""

import sqlite3
from pathlib import Path

from pfedmoap_flwr.errors import UsageError

WAIT_SECONDS = 30.0
ENDED = (
    "SELECT run.run_id FROM run JOIN task ON task.task_id = run.primary_task_id "
    "WHERE task.finished_at IS NOT NULL"
)
STEPS = (
    f"DELETE FROM message_ins WHERE run_id IN ({ENDED})",
    f"DELETE FROM message_res WHERE run_id IN ({ENDED})",
    f"DELETE FROM run_objects WHERE run_id IN ({ENDED})",
    "DELETE FROM objects WHERE object_id NOT IN (SELECT object_id FROM run_objects)",
    "DELETE FROM object_children WHERE parent_id NOT IN (SELECT object_id FROM objects)",
)


def forget_messages(database: Path) -> None:
    """Remove all messages of ended runs, and every byte that was once one.

    The SuperLink may go on, and so may other runs.

    Raises UsageError where there is no such database, or others keep it busy.
    """
    if not database.is_file():
        raise UsageError(f"{database}: no database of a SuperLink there")
    try:
        connection = sqlite3.connect(database, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            for step in ("BEGIN IMMEDIATE", *STEPS, "COMMIT"):
                connection.execute(step)
            # Free pages go by VACUUM, the pages of before by emptying the journal
            connection.execute("VACUUM")
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UsageError(f"{database}: messages cannot be removed ({error}); try again") from error
    if busy:
        raise UsageError(f"{database}: is busy, and its journal stays; try again")
