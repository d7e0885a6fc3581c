//! From the MessagePack of a `config` block to a struct, by the table of its keys. Whatever the bytes hold, the answer is
//! a struct within the table's bounds or one sentence, in bounded time and memory.

use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};
use thiserror::Error;

use super::schema::{Key, Kind, Presence};

/// Of one block: far more than the kernel takes as arguments, far less than would hurt.
const MAX_BLOCK_BYTES: usize = 4 << 20;
/// Of a value that is quoted in a sentence.
const MAX_QUOTE_CHARS: usize = 40;
const MAX_DEPTH: usize = 32;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("the block cannot be read: {0}")]
    Unreadable(String),
    #[error("the block is {0} bytes long; at most {MAX_BLOCK_BYTES} are read")]
    TooLong(usize),
    #[error("{0} is not set; give it a value")]
    NotSet(&'static str),
    /// Key, and what is wrong with its value.
    #[error("{0} {1}")]
    Value(&'static str, String),
}

/// Reads a block. Nil and absent keys take their defaults, keys outside the table are ignored.
pub fn block<T: DeserializeOwned>(msgpack: &[u8], table: &'static [Key]) -> Result<T, ConfigError> {
    if msgpack.len() > MAX_BLOCK_BYTES {
        return Err(ConfigError::TooLong(msgpack.len()));
    }
    let mut given = read(msgpack, table)?;
    for key in table {
        if !given.contains_key(key.name) {
            given.insert(key.name.into(), absent(key)?);
        }
    }
    serde_json::from_value(Value::Object(given)).map_err(unreadable)
}

fn read(msgpack: &[u8], table: &'static [Key]) -> Result<Map<String, Value>, ConfigError> {
    if msgpack.is_empty() {
        return Ok(Map::new());
    }
    let mut reader = rmp_serde::Deserializer::from_read_ref(msgpack);
    reader.set_max_depth(MAX_DEPTH);
    let mut given = Map::new();
    for (key, value) in Block(table).deserialize(&mut reader).map_err(unreadable)? {
        if let Some(value) =
            check(key.kind, value).map_err(|problem| ConfigError::Value(key.name, problem))?
        {
            given.insert(key.name.into(), value);
        }
    }
    Ok(given)
}

fn unreadable(error: impl fmt::Display) -> ConfigError {
    ConfigError::Unreadable(quote(&error.to_string()).trim_matches('"').into())
}

fn absent(key: &Key) -> Result<Value, ConfigError> {
    match (key.presence, key.kind) {
        (Presence::Required, _) => Err(ConfigError::NotSet(key.name)),
        (Presence::Default(literal), _) => serde_json::from_str(literal).map_err(unreadable),
        (Presence::Optional, Kind::Bool) => Ok(false.into()),
        (Presence::Optional, Kind::Integer { .. }) => Ok(0.into()),
        (Presence::Optional, Kind::Text { .. }) => Ok("".into()),
        (Presence::Optional, Kind::List { .. }) => Ok(Value::Array(Vec::new())),
    }
}

/// The value if it is one of its kind, `None` if it counts as absent, or what is wrong with it.
fn check(kind: Kind, given: Given) -> Result<Option<Value>, String> {
    match (kind, given) {
        (_, Given::Nil) => Ok(None),
        (Kind::Bool, Given::Bool(value)) => Ok(Some(value.into())),
        (Kind::Bool, other) => Err(format!(
            "= {other} is neither true nor false; write one of them"
        )),
        (Kind::Integer { min, max }, Given::Integer(value)) => match i64::try_from(value) {
            Ok(value) if (min..=max).contains(&value) => Ok(Some(value.into())),
            _ => Err(format!(
                "= {value} is out of bounds; give one from {min} to {max}"
            )),
        },
        (Kind::Integer { min, max }, other) => Err(format!(
            "= {other} is not a whole number; give one from {min} to {max}"
        )),
        (Kind::Text { .. }, Given::Text(text)) if text.is_empty() => Ok(None),
        (Kind::Text { max_bytes }, Given::Text(text)) => {
            fits(&text, max_bytes).map(|()| Some(text.into()))
        }
        (Kind::Text { .. }, other) => Err(format!("= {other} is not a text; put it in quotes")),
        (
            Kind::List {
                max_entries,
                max_bytes,
            },
            Given::List(list),
        ) => {
            if list.count > max_entries {
                return Err(format!(
                    "has {} entries; at most {max_entries} are taken",
                    list.count
                ));
            }
            if let Some(entry) = list.unfit {
                return Err(format!(
                    "has an entry {entry}, which is not a text; put it in quotes"
                ));
            }
            for text in &list.texts {
                fits(text, max_bytes)?;
            }
            Ok(Some(list.texts.into()))
        }
        (Kind::List { .. }, other) => Err(format!(
            "= {other} is not a list; write it as a list of texts"
        )),
    }
}

fn fits(text: &str, max_bytes: usize) -> Result<(), String> {
    if text.len() > max_bytes {
        return Err(format!(
            "has {}, which is {} bytes long; at most {max_bytes} are taken",
            quote(text),
            text.len()
        ));
    }
    if text.contains('\0') {
        return Err(format!(
            "has {}, in which there is a NUL; no argument or path can hold one",
            quote(text)
        ));
    }
    Ok(())
}

/// The text in quotes, cut, with control characters shown.
fn quote(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTE_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// A value as it came, before the table judges it. Nothing deeper than a list of texts is kept.
enum Given {
    Nil,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Texts),
    Map,
    Bytes,
    Extension,
}

#[derive(Default)]
struct Texts {
    count: usize,
    texts: Vec<String>,
    /// The first entry that is no text.
    unfit: Option<String>,
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Given::Nil => f.write_str("null"),
            Given::Bool(value) => write!(f, "{value}"),
            Given::Integer(value) => write!(f, "{value}"),
            Given::Float(value) => write!(f, "{value}"),
            Given::Text(text) => f.write_str(&quote(text)),
            Given::List(_) => f.write_str("a list"),
            Given::Map => f.write_str("a map"),
            Given::Bytes => f.write_str("bytes"),
            Given::Extension => f.write_str("an extension"),
        }
    }
}

fn keep(kind: Kind) -> usize {
    match kind {
        Kind::List { max_entries, .. } => max_entries,
        _ => 0,
    }
}

struct Block(&'static [Key]);

impl<'de> DeserializeSeed<'de> for Block {
    type Value = Vec<(&'static Key, Given)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Block {
    type Value = Vec<(&'static Key, Given)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of keys and values")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values: Self::Value = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            match self.0.iter().find(|key| key.name == name) {
                Some(key) => {
                    let value = map.next_value_seed(AnyGiven {
                        keep: keep(key.kind),
                    })?;
                    // The last of two wins, and a block of repeated keys stays small.
                    values.retain(|(earlier, _)| earlier.name != key.name);
                    values.push((key, value));
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(values)
    }
}

/// Reads any value; of a list, keeps no more texts than these.
#[derive(Clone, Copy)]
struct AnyGiven {
    keep: usize,
}

impl<'de> DeserializeSeed<'de> for AnyGiven {
    type Value = Given;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Given, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyGiven {
    type Value = Given;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Given, E> {
        Ok(Given::Nil)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Given, E> {
        Ok(Given::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Given, E> {
        Ok(Given::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Given, E> {
        Ok(Given::Integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Given, E> {
        Ok(Given::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Given, E> {
        Ok(Given::Text(value.into()))
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<Given, E> {
        Ok(Given::Bytes)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Given, D::Error> {
        // How rmp-serde presents an extension: it has to be read to its end.
        inner.deserialize_any(IgnoredAny).map(|_| Given::Extension)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Given, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Given::Map)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Given, A::Error> {
        let mut list = Texts::default();
        while let Some(entry) = entries.next_element_seed(AnyGiven { keep: 0 })? {
            list.count += 1;
            match entry {
                Given::Text(text) if list.texts.len() < self.keep => list.texts.push(text),
                Given::Text(_) => {}
                other => {
                    list.unfit.get_or_insert_with(|| other.to_string());
                }
            }
        }
        Ok(Given::List(list))
    }
}
