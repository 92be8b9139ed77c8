//! What operators said about routes, and what the balancer took of the apps'.
//!
//! A word about a host or port stands until it is taken back; saying another one about the same target replaces it.
//! Each is written with who said it, when and why, and with an event, which stays when the word is taken back: that is
//! the audit.

use std::collections::BTreeMap;

use epagent_core::name::AppName;
use epagent_core::route::Word;
use epagent_core::spec::RouteMatch;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use crate::error::During;
use crate::row::{RowExt, cut, json, signed};
use crate::write::WriteTx;
use crate::{Result, Store, StoreError};

/// Targets that words may be about.
pub const WORDS_MAX: usize = 1_000;
/// Upstreams that may be drained by the operator at a time.
pub const DRAINS_MAX: usize = 1_000;
/// The longest reason, in bytes; a longer one is cut.
pub const WHY_BYTES_MAX: usize = 500;

/// Who said something, when, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub who: String,
    /// May be empty.
    pub why: String,
    pub at_ms: u64,
}

/// A word in force about a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteWord {
    /// Never given to a word about another target.
    pub number: i64,
    pub target: RouteMatch,
    pub word: Word,
    pub said: Said,
}

/// An upstream that the operator took out of the balancer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteDrain {
    pub upstream: String,
    /// The route it was named by.
    pub target: RouteMatch,
    pub said: Said,
}

impl FromRow<'_, SqliteRow> for Said {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Said { who: row.try_get("who")?, why: row.try_get("why")?, at_ms: row.unsigned("at_ms")? })
    }
}

impl FromRow<'_, SqliteRow> for RouteWord {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(RouteWord {
            number: row.try_get("number")?,
            target: row.parsed("target")?,
            word: row.json("word")?,
            said: Said::from_row(row)?,
        })
    }
}

impl FromRow<'_, SqliteRow> for RouteDrain {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(RouteDrain {
            upstream: row.try_get("upstream")?,
            target: row.parsed("target")?,
            said: Said::from_row(row)?,
        })
    }
}

impl Store {
    /// All words, by target.
    pub async fn route_words(&self) -> Result<Vec<RouteWord>> {
        sqlx::query_as("SELECT * FROM route_words ORDER BY target")
            .fetch_all(&self.readers)
            .await
            .during("read what was said about routes")
    }

    /// Says a word about a target in place of the one before, which is returned. The caller has checked it.
    pub async fn route_say(
        &self,
        target: &RouteMatch,
        word: &Word,
        said: &Said,
    ) -> Result<Option<RouteWord>> {
        const OPERATION: &str = "record what was said about a route";
        let mut tx = self.write(OPERATION).await?;
        let before = find(&mut tx, OPERATION, target).await?;
        if before.is_none() {
            bounded(&mut tx, OPERATION, "SELECT count(*) FROM route_words", "words about routes", WORDS_MAX)
                .await?;
        }
        sqlx::query(
            "INSERT INTO route_words (target, word, who, why, at_ms) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (target) DO UPDATE
             SET word = excluded.word, who = excluded.who, why = excluded.why, at_ms = excluded.at_ms",
        )
        .bind(target.to_string())
        .bind(json(word).during(OPERATION)?)
        .bind(&said.who)
        .bind(cut(&said.why, WHY_BYTES_MAX))
        .bind(signed(said.at_ms))
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        audit(&mut tx, &format!("{target} {word}"), &format!("route.{}", word.kind()), said).await?;
        tx.commit().await?;
        Ok(before)
    }

    /// Takes back what was said about a target; returns it. `kind` names the event: `route.release`, `route.clear`.
    pub async fn route_unsay(
        &self,
        target: &RouteMatch,
        kind: &str,
        said: &Said,
    ) -> Result<Option<RouteWord>> {
        const OPERATION: &str = "take back what was said about a route";
        let mut tx = self.write(OPERATION).await?;
        let Some(before) = find(&mut tx, OPERATION, target).await? else { return Ok(None) };
        sqlx::query("DELETE FROM route_words WHERE number = ?1")
            .bind(before.number)
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        audit(&mut tx, &format!("{target} no longer {}", before.word), kind, said).await?;
        tx.commit().await?;
        Ok(Some(before))
    }

    pub async fn route_drains(&self) -> Result<Vec<RouteDrain>> {
        sqlx::query_as("SELECT * FROM route_drains ORDER BY upstream")
            .fetch_all(&self.readers)
            .await
            .during("read what is drained")
    }

    /// Takes an upstream out of the balancer; said again, it changes nothing and says so by false.
    pub async fn route_drain(&self, drain: &RouteDrain) -> Result<bool> {
        const OPERATION: &str = "record what is drained";
        let RouteDrain { upstream, target, said } = drain;
        let mut tx = self.write(OPERATION).await?;
        bounded(&mut tx, OPERATION, "SELECT count(*) FROM route_drains", "drained upstreams", DRAINS_MAX)
            .await?;
        let done = sqlx::query(
            "INSERT INTO route_drains (upstream, target, who, why, at_ms) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (upstream) DO NOTHING",
        )
        .bind(upstream)
        .bind(target.to_string())
        .bind(&said.who)
        .bind(cut(&said.why, WHY_BYTES_MAX))
        .bind(signed(said.at_ms))
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        audit(&mut tx, &format!("{upstream} of {target} is drained"), "route.drain", said).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Puts upstreams back into the balancer: one, or all that were named by this target. Returns which.
    pub async fn route_undrain(
        &self,
        target: &RouteMatch,
        upstream: Option<&str>,
        said: &Said,
    ) -> Result<Vec<String>> {
        const OPERATION: &str = "record what is not drained any more";
        let mut tx = self.write(OPERATION).await?;
        let back: Vec<String> = sqlx::query_scalar(
            "DELETE FROM route_drains WHERE (?2 IS NULL AND target = ?1) OR upstream = ?2 RETURNING upstream",
        )
        .bind(target.to_string())
        .bind(upstream)
        .fetch_all(tx.db())
        .await
        .during(OPERATION)?;
        for upstream in &back {
            let what = format!("{upstream} of {target} is no longer drained");
            audit(&mut tx, &what, "route.clear", said).await?;
        }
        tx.commit().await?;
        Ok(back)
    }

    /// The routes of each app as they were last recorded, in the words of the balancer's table.
    pub async fn routes_taken(&self) -> Result<BTreeMap<AppName, String>> {
        const OPERATION: &str = "read the routes the balancer took";
        let rows: Vec<SqliteRow> = sqlx::query("SELECT app, routes FROM routes_taken")
            .fetch_all(&self.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(|row| Ok((row.parsed("app")?, row.try_get("routes")?)))
            .collect::<sqlx::Result<_>>()
            .during(OPERATION)
    }

    /// Records what the balancer has taken of these apps. An app that is gone meanwhile is left out.
    pub async fn routes_taken_set(&self, routes: &BTreeMap<AppName, String>) -> Result<()> {
        const OPERATION: &str = "record the routes the balancer took";
        let mut tx = self.write(OPERATION).await?;
        for (app, routes) in routes {
            sqlx::query(
                "INSERT INTO routes_taken (app, routes) SELECT app, ?2 FROM apps WHERE app = ?1
                 ON CONFLICT (app) DO UPDATE SET routes = excluded.routes",
            )
            .bind(app.as_str())
            .bind(routes)
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        }
        tx.commit().await
    }
}

async fn find(tx: &mut WriteTx, operation: &'static str, target: &RouteMatch) -> Result<Option<RouteWord>> {
    sqlx::query_as("SELECT * FROM route_words WHERE target = ?1")
        .bind(target.to_string())
        .fetch_optional(tx.db())
        .await
        .during(operation)
}

async fn bounded(
    tx: &mut WriteTx,
    operation: &'static str,
    count: &'static str,
    what: &str,
    limit: usize,
) -> Result<()> {
    let found: i64 = sqlx::query_scalar(count).fetch_one(tx.db()).await.during(operation)?;
    let found = usize::try_from(found).unwrap_or(usize::MAX);
    if found >= limit {
        return Err(StoreError::TooMuch { what: what.to_owned(), found: found + 1, limit });
    }
    Ok(())
}

/// The event of a change: what, by whom, and why when a reason was given.
async fn audit(tx: &mut WriteTx, what: &str, kind: &str, said: &Said) -> Result<()> {
    let why = cut(&said.why, WHY_BYTES_MAX);
    let because = if why.is_empty() { String::new() } else { format!(": {why}") };
    tx.event(None, None, kind, &format!("{what}, by {}{because}", said.who), said.at_ms).await?;
    Ok(())
}
