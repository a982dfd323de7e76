"""The shape of a statement tells statements apart and never shows a value."""

from __future__ import annotations

import pytest

from fastapi_headroom.probes.shape import LONGEST, SHOWN, shape_of


@pytest.mark.parametrize(
    ("system", "sql", "shape"),
    [
        ("postgresql", "SELECT * FROM t1 WHERE a = 5 AND b=-2.5e3", "SELECT * FROM t1 WHERE a = ? AND b=-?"),
        ("postgresql", "SELECT 'it''s', E'x', U&'d', 0xFF, .5, n_1 FROM t", "SELECT ?, ... , n_1 FROM t"),
        ("postgresql", 'SELECT "Name 1" FROM "t 2" WHERE x = $1', 'SELECT "Name 1" FROM "t 2" WHERE x = ?'),
        ("postgresql", "SELECT x FROM t WHERE x = $1::INTEGER", "SELECT x FROM t WHERE x = ?::INTEGER"),
        ("postgresql", "WHERE x IN ($1::INTEGER, $2::INTEGER)", "WHERE x IN (?, ...)"),
        ("postgresql", "WHERE x IN ($1, $2, $3)", "WHERE x IN (?, ...)"),
        ("postgresql", "SELECT $$secret$$, $a$it's $$ secret$a$ FROM t", "SELECT ?, ... FROM t"),
        ("postgresql", "WHERE x = %(x_1)s AND y = %s", "WHERE x = ? AND y = ?"),
        ("postgresql", "INSERT INTO t VALUES (1, 2), (3, 4), (5, 6)", "INSERT INTO t VALUES (?, ...), ..."),
        ("sqlite", "WHERE x = :x AND y = ? AND z::text = 1", "WHERE x = ? AND y = ? AND z::text = ?"),
        ("postgresql", """SELECT "it's" FROM t WHERE x = 'it'""", """SELECT "it's" FROM t WHERE x = ?"""),
        ("mysql", 'SELECT `a b` FROM t WHERE x = "secret"', "SELECT `a b` FROM t WHERE x = ?"),
        ("sqlite", "SELECT 1 -- token=secret\nFROM t /* secret */ WHERE a", "SELECT ? FROM t WHERE a"),
    ],
)
def test_shapes(system: str, sql: str, shape: str) -> None:
    """Values, placeholders of every style and lists of any length fold; names and structure stay."""
    assert shape_of(sql, system).replace("?, ..., ", "?, ... , ") == shape


@pytest.mark.parametrize("system", ["postgresql", "mysql", "sqlite", "oracle"])
@pytest.mark.parametrize(
    "sql",
    [
        r"SELECT 'it\'s hunter2', 1",
        r"SELECT 'a\', 'hunter2'",
        r"SELECT '\\', 'hunter2'",
        r"SELECT E'\'hunter2'",
        "SELECT 'hunter2",
        "SELECT 'a' 'hunter2' AS b",
        "SELECT $x$ ' $x$, 'hunter2'",
        "SELECT /* ' */ 'hunter2'",
        "SELECT '/*', 'hunter2' -- '",
        "SELECT '--', 'hunter2'",
        "SELECT /* 'hunter2",
        "SELECT $$hunter2",
    ],
)
def test_no_value_shows(system: str, sql: str) -> None:
    """However quotes, backslashes and comments are mixed, and cut short, the password is not in the shape."""
    assert "hunter2" not in shape_of(sql, system)


@pytest.mark.parametrize("sql", ["SELECT `it's`, 'hunter2'", "SELECT a # it's\n, 'hunter2'"])
def test_no_value_shows_in_the_words_of_mysql(sql: str) -> None:
    """MySQL's quotes of names and comments of its own hide no quote."""
    assert "hunter2" not in shape_of(sql, "mysql")


def test_shapes_are_short() -> None:
    """A statement of any length has a shape of bounded length, also when it is cut within a value."""
    assert len(shape_of("SELECT " + ", ".join(f"column_{i}" for i in range(5_000)), "sqlite")) == SHOWN
    assert shape_of("SELECT '" + "hunter2 " * LONGEST + "'", "sqlite") == "SELECT ?"
