"""Where an index over Postgres is, the connection to it, and what the server refuses in words.

Contract: no message and no representation holds a password. Knows nothing of the tables of an index.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard
from urllib.parse import unquote

from stripedrag.errors import SetupError, StoreError, UsageError
from stripedrag.indexes import checks

if TYPE_CHECKING:
    from psycopg import Connection

CONNECT_TIMEOUT_S = 30
LOCK_TIMEOUT_S = 600  # that a writer waits for another, which may be building a graph
PGVECTOR = (0, 8)  # the first that goes on with a scan of its graph until there is enough
_MOST_NAME_BYTES = 63  # what is longer, Postgres cuts
_SECRET = ("password", "secret", "scram")  # in the names of parameters
# By SQLSTATE or its class.
_MENDS = {
    "0A": "Install pgvector 0.8 or later on the server",
    "42501": "Let the owner of the database or of the schema grant it",
    "53": "Give the server more room",
    "53100": "Free space on the server's disk, and compact it: what was not committed still takes some",
    "55P03": f"Another process has been writing to it for {LOCK_TIMEOUT_S} s. Wait for its end",
    "58P01": "Install pgvector 0.8 or later on the server",
}
# One "@" alone, and no "/", "?" or "#" before it: what else libpq took a password for, it might tell as a host.
_URI = re.compile(
    r"(?P<scheme>postgres(?:ql)?://)(?:(?P<user>[^:@/?#]*)(?P<password>:[^@/?#]*)?(?P<at>@))?"
    r"(?P<place>[^@?#]*)(?:\?(?P<query>[^@#]*))?"
)


def is_postgres(place: str | Path) -> TypeGuard[str]:
    """Whether `place` is the URI of an index over Postgres."""
    return isinstance(place, str) and place.startswith(("postgresql://", "postgres://"))


@dataclass(frozen=True, slots=True)
class Address:
    """An index over Postgres: `index` is its name and its schema's, `shown` its URI without a password."""

    index: str
    shown: str
    conninfo: str = field(repr=False)

    @classmethod
    def parse(cls, uri: str) -> "Address":
        """The address that is written `postgresql://user:password@host:port/database?index=NAME`.

        Raises `UsageError` where it is not written so, and for a name that Postgres has no schema of.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise UsageError(
                "the URI of the index cannot be read. Write postgresql://user:password@host:port/database?index=NAME, "
                "and any of @ : / ? # % in a part of it as %40 %3A %2F %3F %23 %25."
            )
        before = f"{match['scheme']}{match['user'] or ''}"
        parameters = [part for part in (match["query"] or "").split("&") if part]
        named = [unquote(part.partition("=")[2]) for part in parameters if part.startswith("index=")]
        open_ones = [
            part for part in parameters if not any(word in unquote(part.partition("=")[0]) for word in _SECRET)
        ]
        shown = "&".join(open_ones)
        shown = f"{before}{match['at'] or ''}{match['place']}" + (f"?{shown}" if shown else "")
        if len(named) != 1 or not named[0]:
            raise UsageError(f"{shown} names no index. Write {shown}{'&' if '?' in shown else '?'}index=NAME.")
        (name,) = named
        if "\0" in name or checks.lone_surrogate(name) or len(name.encode()) > _MOST_NAME_BYTES:
            raise UsageError(
                f"an index cannot be named {name!r}: a name over Postgres has at most {_MOST_NAME_BYTES} bytes of "
                f"UTF-8, and no NUL. Choose another name."
            )
        if name.startswith("pg_") or name == "information_schema":
            raise UsageError(
                f"an index cannot be named {name!r}: Postgres has such schemas itself. Choose another name."
            )
        given = "&".join(part for part in parameters if not part.startswith("index="))
        conninfo = f"{before}{match['password'] or ''}{match['at'] or ''}{match['place']}"
        return cls(name, shown, conninfo + (f"?{given}" if given else ""))

    @property
    def schema(self) -> str:
        """The schema as SQL writes it."""
        return '"' + self.index.replace('"', '""') + '"'


@contextmanager
def connected(address: Address) -> "Iterator[Connection]":
    """A connection that outlives the block, unless an error ends it. It commits by itself; transactions are written.

    Raises `SetupError` where psycopg is missing and `StoreError` where there is no connection.
    """
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as error:
        raise SetupError(f"{address.shown} cannot be read: {error}. Run pip install 'stripedrag[postgres]'.") from error
    try:
        options = conninfo_to_dict(address.conninfo)
    except psycopg.ProgrammingError:  # whose message may quote a part of a password
        raise UsageError(f"{address.shown} cannot be read. Check its parameters and its % signs.") from None
    waited = {"connect_timeout": CONNECT_TIMEOUT_S, **options}["connect_timeout"]
    with ExitStack() as unless_well:
        with told(f"cannot reach {address.shown}"):
            # Without prepared statements: their plans would know neither how rare a word nor how long a list is.
            database = psycopg.connect(
                address.conninfo,
                autocommit=True,
                prepare_threshold=None,
                client_encoding="utf8",
                connect_timeout=waited,
            )
        unless_well.callback(database.close)
        encoding = database.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise UsageError(
                f"{address.shown}: the database has encoding {encoding}; an index needs UTF8. Make another."
            )
        yield database
        unless_well.pop_all()


def enter(database: "Connection", address: Address, *, create: bool = False) -> None:
    """Makes the schema of `address` the one that SQL means, with pgvector beside it; `create` makes the extension.

    Raises `StoreError` where pgvector is missing or too old.
    """
    from pgvector.psycopg import register_vector

    query = "SELECT extnamespace::regnamespace::text, extversion FROM pg_extension WHERE extname = 'vector'"
    found = database.execute(query).fetchone()
    if found is None and create:
        database.execute("CREATE EXTENSION vector SCHEMA public")
        found = database.execute(query).fetchone()
    if found is None or tuple(int(part) for part in found[1].split(".")[:2]) < PGVECTOR:
        has = "no extension vector" if found is None else f"the extension vector {found[1]}"
        wanted = ".".join(map(str, PGVECTOR))
        raise StoreError(
            f"the database of {address.shown} has {has}; an index needs {wanted} or later. "
            f"Let its owner run {'CREATE EXTENSION vector' if found is None else 'ALTER EXTENSION vector UPDATE'}."
        )
    # pg_temp last, so that no temporary table stands before one of the index. Compiling would cost more than it gains.
    database.execute(f"SET search_path = {address.schema}, {found[0]}, pg_temp")
    database.execute(f"SET jit = off; SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    register_vector(database)


@contextmanager
def told(what: str) -> Iterator[None]:
    """What Postgres or psycopg refuses, told as a `StoreError` that begins with `what` and ends with its mend."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        reason = (error.diag.message_primary or str(error)).strip().splitlines()[0]
        if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
            mend = "Check that the server runs and that the URI is right; an index that was open must be opened again"
        else:
            mend = _MENDS.get(error.sqlstate) or _MENDS.get(error.sqlstate[:2], "Run verify on it")
        raise StoreError(f"{what}: {reason}. {mend}.") from error
