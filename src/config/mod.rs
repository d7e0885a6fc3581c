//! What operators and job authors may write. One table of keys says it all; no I/O and nothing of the wire but MessagePack.

pub mod decode;
pub mod plugin;
pub mod schema;
pub mod task;
