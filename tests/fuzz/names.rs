//! Words of a job on their way to systemd, logs and terminals, and what comes back from there.

use nomad_driver_exec2::cgroup::unified;
use nomad_driver_exec2::mountinfo;
use nomad_driver_exec2::plan::unit::{self, UnitName};
use nomad_driver_exec2::task::types::Names;
use nomad_driver_exec2::text::{UnitText, one_line};

use crate::mutate::Target;

/// Nothing in it ends a line, a directive or a sequence, or turns the text around.
pub fn assert_inert(text: &str) {
    for character in text.chars() {
        let code = u32::from(character);
        let is_active = code < 0x20
            || (0x7f..0xa0).contains(&code)
            || character == '\\'
            || [0x061c, 0x2028, 0x2029, 0xfeff].contains(&code)
            || (0x200b..=0x200f).contains(&code)
            || (0x202a..=0x202e).contains(&code)
            || (0x2066..=0x2069).contains(&code);
        assert!(!is_active, "U+{code:04X} in {text:?}");
    }
}

/// systemd.unit(5): what a name may be made of.
pub fn assert_unit(name: &UnitName) {
    let name = name.as_str();
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b":_.\\-".contains(&byte);
    assert!(name.len() <= 200 && name.bytes().all(is_valid), "{name}");
    assert!(
        name.starts_with("exec2-") && name.ends_with(".scope"),
        "{name}"
    );
    assert_eq!(
        UnitName::existing(name).as_ref().map(UnitName::as_str),
        Some(name)
    );
}

#[test]
fn unit_name() {
    Target {
        name: "unit_name",
        samples: &[],
        tokens: b"/ - \\ \\x2d .scope @ %n .. \r\n[Unit]\nOnSuccess=x deadbeef \xe2\x80\xa8 \xc2\x85 \xef\xbb\xbf \x1b[2J",
        run: |bytes| {
            let id = String::from_utf8_lossy(bytes);
            let name = UnitName::of_task(&id);
            assert_unit(&name);
            assert_ne!(name, UnitName::of_task(&format!("{id}x")));
            // An id of Nomad's keeps what tells it from every other one, whatever its task's name is.
            let task = id.replace('/', "-");
            let named = UnitName::of_task(&format!(
                "0a1b2c3d-1111-2222-3333-444455556666/{task}x/deadbeef"
            ));
            assert_unit(&named);
            assert!(
                named.as_str().ends_with("-0a1b2c3d-deadbeef.scope"),
                "{named}"
            );
            let (shown, alloc) = named.parts().unwrap();
            assert_eq!(alloc, "0a1b2c3d");
            assert!(!shown.is_empty());
            if let Some(name) = UnitName::existing(&id) {
                assert_unit(&name);
                name.parts();
            }
        },
    }
    .fuzz();
}

#[test]
fn unit_text() {
    Target {
        name: "unit_text",
        samples: &["tests/fuzz/corpus/unit_name"],
        tokens: b"\n \\ of / (alloc \xe2\x80\xae \xe2\x81\xa6 \xc2\x85 \xe2\x80\x8b \xf3\xa0\x81\x81 Nomad\ttask",
        run: |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let safe = UnitText::new(&text);
            assert!(safe.as_str().len() <= UnitText::MAX_BYTES);
            assert_inert(safe.as_str());
            assert_eq!(
                UnitText::new(safe.as_str()),
                safe,
                "what is inert stays as it is"
            );
            for room in [3, 4, 20, 1_500] {
                let line = one_line(&text, room);
                assert!(line.len() <= room, "{line:?}");
                assert_inert(&line);
            }
            let mut words = text.split('|').map(str::to_owned);
            let mut word = || words.next().unwrap_or_default();
            let names = Names {
                namespace: word(),
                job: word(),
                group: word(),
                task: word(),
                alloc_id: word(),
                node_id: word(),
                ..Names::default()
            };
            for told in [unit::description(&names).to_string(), unit::owner(&names)] {
                assert!(told.len() <= UnitText::MAX_BYTES + "node ".len());
                assert_inert(&told);
                unit::path_in(&told);
            }
            if let Some(path) = unit::path_in(&text) {
                assert!(path.len() <= text.len() && path.contains('/'), "{path}");
            }
        },
    }
    .fuzz();
}

#[test]
fn kernel_tables() {
    Target {
        name: "kernel_tables",
        samples: &[],
        tokens: b"- \\040 \\134 \\777 \\ 0:: \n /\t/ nsfs",
        run: |bytes| {
            let table = String::from_utf8_lossy(bytes);
            for mount in mountinfo::parse(&table) {
                assert!(mount.point.as_os_str().len() <= table.len());
                assert!(!mount.filesystem.contains(['\n', ' ']));
            }
            if let Some(path) = unified(&table) {
                assert!(!path.contains('\n') && table.contains(path));
            }
        },
    }
    .fuzz();
}
