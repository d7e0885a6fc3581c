//! What we call on systemd is what systemd has: `dbus/` against the live bus of each guest, and against our own proxy.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};

use crate::case;
use crate::nomad::said;

pub const CASES: &[Case] = &[case!(Both, Ours, systemd_has_what_we_call)];

const OURS: &str = include_str!("../../dbus/org.freedesktop.systemd1.Manager.xml");
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";

/// Each member by name: its kind, its signature, and for a property its access.
type Members = BTreeMap<String, String>;

fn members(xml: &str) -> Result<Members> {
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..roxmltree::ParsingOptions::default()
    };
    let document = roxmltree::Document::parse_with_options(xml, options)?;
    let interface = document
        .descendants()
        .find(|node| node.has_tag_name("interface") && node.attribute("name") == Some(INTERFACE))
        .with_context(|| format!("no {INTERFACE}"))?;
    let mut members = Members::new();
    for node in interface.children().filter(|node| node.is_element()) {
        let name = node.attribute("name").context("a member has a name")?;
        let types = |direction: &str| -> String {
            node.children()
                .filter(|arg| arg.has_tag_name("arg"))
                .filter(|arg| arg.attribute("direction").unwrap_or("out") == direction)
                .filter_map(|arg| arg.attribute("type"))
                .collect()
        };
        let kind = node.tag_name().name();
        let what = match kind {
            "property" => format!(
                "property {} {}",
                node.attribute("type").unwrap_or_default(),
                node.attribute("access").unwrap_or_default()
            ),
            "method" | "signal" => format!("{kind} {} -> {}", types("in"), types("out")),
            _ => continue,
        };
        members.insert(name.to_owned(), what);
    }
    Ok(members)
}

fn systemd_has_what_we_call(_: &Context) -> Result<()> {
    let live = said(
        "busctl",
        &[
            "--xml-interface",
            "introspect",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
        ],
    )?;
    let live = members(&live)?;
    ensure!(live.len() > 100, "systemd told only {live:?}");
    let ours = members(OURS)?;
    ensure!(!ours.is_empty());
    for (name, what) in &ours {
        ensure!(
            live.get(name) == Some(what),
            "{name} is {:?} in systemd, {what:?} in dbus/",
            live.get(name)
        );
    }
    Ok(())
}
