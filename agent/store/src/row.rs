//! From rows to types: names parse, JSON deserializes, and a column that does neither is an error that names it.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

pub(crate) trait RowExt {
    /// A text that parses: a name, a phase.
    fn parsed<T>(&self, column: &str) -> sqlx::Result<T>
    where
        T: std::str::FromStr,
        T::Err: std::error::Error + Send + Sync + 'static;

    fn parsed_or_null<T>(&self, column: &str) -> sqlx::Result<Option<T>>
    where
        T: std::str::FromStr,
        T::Err: std::error::Error + Send + Sync + 'static;

    fn json<T: DeserializeOwned>(&self, column: &str) -> sqlx::Result<T>;

    fn json_or_null<T: DeserializeOwned>(&self, column: &str) -> sqlx::Result<Option<T>>;

    /// An integer that is never negative: a time, a size.
    fn unsigned(&self, column: &str) -> sqlx::Result<u64>;

    fn unsigned_or_null(&self, column: &str) -> sqlx::Result<Option<u64>>;
}

impl RowExt for SqliteRow {
    fn parsed<T>(&self, column: &str) -> sqlx::Result<T>
    where
        T: std::str::FromStr,
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        parse(column, self.try_get(column)?)
    }

    fn parsed_or_null<T>(&self, column: &str) -> sqlx::Result<Option<T>>
    where
        T: std::str::FromStr,
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        self.try_get::<Option<&str>, _>(column)?.map(|text| parse(column, text)).transpose()
    }

    fn json<T: DeserializeOwned>(&self, column: &str) -> sqlx::Result<T> {
        serde_json::from_str(self.try_get(column)?).map_err(|source| undecodable(column, source))
    }

    fn json_or_null<T: DeserializeOwned>(&self, column: &str) -> sqlx::Result<Option<T>> {
        let text: Option<&str> = self.try_get(column)?;
        text.map(|text| serde_json::from_str(text).map_err(|source| undecodable(column, source))).transpose()
    }

    fn unsigned(&self, column: &str) -> sqlx::Result<u64> {
        u64::try_from(self.try_get::<i64, _>(column)?).map_err(|source| undecodable(column, source))
    }

    fn unsigned_or_null(&self, column: &str) -> sqlx::Result<Option<u64>> {
        let value: Option<i64> = self.try_get(column)?;
        value.map(|value| u64::try_from(value).map_err(|source| undecodable(column, source))).transpose()
    }
}

fn parse<T>(column: &str, text: &str) -> sqlx::Result<T>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().map_err(|source: T::Err| undecodable(column, source))
}

fn undecodable(column: &str, source: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: Box::new(source) }
}

/// The JSON of a value of our own.
pub(crate) fn json<T: Serialize>(value: &T) -> sqlx::Result<String> {
    serde_json::to_string(value).map_err(|source| sqlx::Error::Encode(Box::new(source)))
}

/// SQLite has signed integers only; what is past them is a time or size that does not exist.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// At most `bytes_max` bytes of a text, cut between two characters.
pub(crate) fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}
