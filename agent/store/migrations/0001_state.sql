-- The agent's state, first version.
--
-- A migration that was released is never edited: its checksum is in the database of everyone who ran it, and one
-- that differs is refused. A new one must leave the binary before it able to run (add, don't rename or drop), since
-- an upgrade that fails is undone by starting that binary again on the migrated file.
--
-- Times are milliseconds since the epoch. Columns named after a message type hold its JSON.

-- What the operator wants of each app. An app that is to be removed stays until nothing of it is left elsewhere.
CREATE TABLE apps (
    app            TEXT PRIMARY KEY,
    created_at_ms  INTEGER NOT NULL,
    wanted         TEXT NOT NULL DEFAULT 'running' CHECK (wanted IN ('running', 'stopped', 'removed')),
    -- Numbers of releases and versions of the configuration are never given twice.
    next_release   INTEGER NOT NULL DEFAULT 1,
    config_version INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

-- A release is image, configuration and versions of secrets: nothing but its state changes after it was written.
CREATE TABLE releases (
    app            TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    number         INTEGER NOT NULL,
    -- The release whose built tree in the pool this one runs on: itself, or an older one when only the
    -- configuration differs.
    tree           INTEGER NOT NULL,
    image          TEXT NOT NULL,
    spec           TEXT NOT NULL,
    config         TEXT NOT NULL,
    config_version INTEGER NOT NULL,
    -- {name: version}; the rows of `secrets` it names are kept as long as the release can be deployed.
    secrets        TEXT NOT NULL,
    state          TEXT NOT NULL CHECK (state IN ('building', 'ready', 'failed', 'removed')),
    created_at_ms  INTEGER NOT NULL,
    PRIMARY KEY (app, number)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER releases_are_immutable
BEFORE UPDATE OF app, number, tree, image, spec, config, config_version, secrets, created_at_ms ON releases
BEGIN
    SELECT RAISE(ABORT, 'a release is immutable');
END;

-- What the next release gets. The history is in `releases`.
CREATE TABLE config (
    app     TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    name    TEXT NOT NULL,
    value   TEXT NOT NULL,
    -- The version of the app's configuration that set it.
    version INTEGER NOT NULL,
    PRIMARY KEY (app, name)
) STRICT, WITHOUT ROWID;

-- Sealed by XChaCha20-Poly1305 with the key in the key file; app, name and version are authenticated with the value,
-- so that a row copied over another one does not open.
CREATE TABLE secrets (
    app       TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    name      TEXT NOT NULL,
    version   INTEGER NOT NULL,
    nonce     BLOB NOT NULL,
    sealed    BLOB NOT NULL,
    set_at_ms INTEGER NOT NULL,
    -- 1: this version says that there is no such secret any more. Nonce and sealed value are empty.
    removed   INTEGER NOT NULL DEFAULT 0 CHECK (removed IN (0, 1)),
    PRIMARY KEY (app, name, version)
) STRICT, WITHOUT ROWID;

-- One row, sealed with the key, which tells the right key file from a wrong one.
CREATE TABLE key_check (
    id     INTEGER PRIMARY KEY CHECK (id = 1),
    nonce  BLOB NOT NULL,
    sealed BLOB NOT NULL
) STRICT;

CREATE TABLE deploys (
    -- Never given twice, also after an app was removed.
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    app           TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    kind          TEXT NOT NULL,
    release       INTEGER NOT NULL,
    phase         TEXT NOT NULL,
    verdict       TEXT,
    created_at_ms INTEGER NOT NULL,
    ended_at_ms   INTEGER,
    -- How far the work of the phase is; its shape is the deciding loop's own affair.
    progress      TEXT NOT NULL
) STRICT;

CREATE UNIQUE INDEX deploys_one_at_a_time ON deploys (app) WHERE phase NOT IN ('done', 'failed');
CREATE INDEX deploys_of_app ON deploys (app, id);

CREATE TABLE deploy_steps (
    deploy   INTEGER NOT NULL REFERENCES deploys (id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    phase    TEXT NOT NULL,
    note     TEXT NOT NULL,
    at_ms    INTEGER NOT NULL,
    PRIMARY KEY (deploy, sequence)
) STRICT, WITHOUT ROWID;

-- An instance is live until it has an end. `idx` is its place among the instances of its process.
CREATE TABLE instances (
    jail          TEXT PRIMARY KEY,
    app           TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    deploy        INTEGER NOT NULL,
    release       INTEGER NOT NULL,
    process       TEXT NOT NULL,
    idx           INTEGER NOT NULL,
    state         TEXT NOT NULL,
    address       TEXT,
    created_at_ms INTEGER NOT NULL,
    started_at_ms INTEGER,
    ended_at_ms   INTEGER,
    exit          TEXT,
    restarts      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX instances_of_app ON instances (app, ended_at_ms);

-- What `epagent scale` said, which goes before the manifest's number.
CREATE TABLE scale (
    app       TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    process   TEXT NOT NULL,
    instances INTEGER NOT NULL,
    PRIMARY KEY (app, process)
) STRICT, WITHOUT ROWID;

CREATE TABLE volumes (
    app         TEXT NOT NULL REFERENCES apps (app) ON DELETE CASCADE,
    volume      TEXT NOT NULL,
    quota_bytes INTEGER NOT NULL,
    -- Where the app sees it.
    path        TEXT NOT NULL,
    PRIMARY KEY (app, volume)
) STRICT, WITHOUT ROWID;

-- What happened. `app` refers to nothing: the removal of an app is an event as well.
CREATE TABLE events (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms   INTEGER NOT NULL,
    app     TEXT,
    deploy  INTEGER,
    kind    TEXT NOT NULL,
    message TEXT NOT NULL
) STRICT;

CREATE INDEX events_of_app ON events (app, id);

-- The shared error table: one row per code and subject, counted.
CREATE TABLE errors (
    code        TEXT NOT NULL,
    subject     TEXT NOT NULL,
    message     TEXT NOT NULL,
    backtrace   TEXT,
    count       INTEGER NOT NULL,
    first_at_ms INTEGER NOT NULL,
    last_at_ms  INTEGER NOT NULL,
    PRIMARY KEY (code, subject)
) STRICT, WITHOUT ROWID;

CREATE INDEX errors_by_time ON errors (last_at_ms);

-- Counters that must survive a restart, like the version of the balancer's table.
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
