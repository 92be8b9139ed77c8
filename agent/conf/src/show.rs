//! What is in force, value by value, for people and for support.

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::Loaded;
use crate::merge::dotted;

/// One value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// `build.memory`
    pub key: String,
    /// As TOML writes it.
    pub value: String,
    /// `FILE:LINE`, or `default`.
    pub origin: String,
}

impl<T: Serialize> Loaded<T> {
    /// Every value in force, those that no file says included; what is [`crate::Private`] is not in it.
    pub fn settings(&self) -> Result<Vec<Setting>, toml::ser::Error> {
        let mut settings = Vec::new();
        self.flatten("", Table::try_from(&self.config)?, &mut settings);
        Ok(settings)
    }

    fn flatten(&self, above: &str, table: Table, settings: &mut Vec<Setting>) {
        for (name, value) in table {
            let key = dotted(above, &name);
            match value {
                Value::Table(table) => self.flatten(&key, table, settings),
                value => {
                    let place = self.origins.of(&key).map(ToString::to_string);
                    let origin = place.unwrap_or_else(|| "default".to_owned());
                    settings.push(Setting { key, value: value.to_string(), origin });
                }
            }
        }
    }
}
