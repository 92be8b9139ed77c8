-- What operators say about routes, and processes that sleep.

-- What the operator said of a host or a port, which goes before what the apps ask for; and who, when and why. What
-- was said before is in the events.
CREATE TABLE route_words (
    -- In the balancer's table a route of nobody's app is called by its number, which is never given twice.
    number  INTEGER PRIMARY KEY AUTOINCREMENT,
    -- `shop.example`, `*.example`, `5432`.
    target  TEXT NOT NULL UNIQUE,
    word    TEXT NOT NULL,
    who     TEXT NOT NULL,
    why     TEXT NOT NULL,
    at_ms   INTEGER NOT NULL
) STRICT;

-- Instances and backends that the operator took out of the balancer. One of an instance goes with the instance.
CREATE TABLE route_drains (
    upstream TEXT PRIMARY KEY,
    -- The route it was named by.
    target   TEXT NOT NULL,
    who      TEXT NOT NULL,
    why      TEXT NOT NULL,
    at_ms    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The routes of each app as the balancer took them last: they stand in when the app can't be looked at, or when the
-- balancer refuses its newer ones.
CREATE TABLE routes_taken (
    app    TEXT PRIMARY KEY REFERENCES apps (app) ON DELETE CASCADE,
    routes TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Processes with `min = 0` that were stopped because nobody asked for them.
CREATE TABLE asleep (
    app      TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    process  TEXT NOT NULL,
    since_ms INTEGER NOT NULL,
    PRIMARY KEY (app, process)
) STRICT, WITHOUT ROWID;
