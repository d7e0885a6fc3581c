//! From our table of keys to the specification by which Nomad checks a block.

use crate::config::schema::{Key, Presence};
use crate::proto::hashicorp::nomad::plugins::shared::hclspec::spec::Block;
use crate::proto::hashicorp::nomad::plugins::shared::hclspec::{
    Attr, Default, Literal, Object, Spec,
};

pub fn spec(table: &[Key]) -> Spec {
    let attributes = table
        .iter()
        .map(|key| (key.name.into(), attribute(key)))
        .collect();
    of(Block::Object(Object { attributes }))
}

fn attribute(key: &Key) -> Spec {
    // The name has to be said: inside a default, Nomad does not take it from the map.
    let attr = of(Block::Attr(Attr {
        name: key.name.into(),
        r#type: key.kind.hcl_type().into(),
        required: key.presence == Presence::Required,
    }));
    match key.presence {
        Presence::Required | Presence::Optional => attr,
        Presence::Default(value) => of(Block::Default(Box::new(Default {
            primary: Some(Box::new(attr)),
            default: Some(Box::new(of(Block::Literal(Literal {
                value: value.into(),
            })))),
        }))),
    }
}

fn of(block: Block) -> Spec {
    Spec { block: Some(block) }
}
