//! What outlives a plugin: its handle of a task, the exit record, and the words between helper and plugin.

use std::os::fd::AsFd;

use nomad_driver_exec2::launch::report::{self, Message};
use nomad_driver_exec2::plan::unit::UnitName;
use nomad_driver_exec2::record::{self, Exit, Record};
use nomad_driver_exec2::task::state::{DriverState, VERSION};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use crate::mutate::Target;

#[test]
fn driver_state() {
    Target {
        name: "driver_state",
        samples: &[],
        tokens: b"\"unit\":\"\" \"cgroup\": null -1 1e400 18446744073709551616 4294967296 { [ \\u0000 \\ud800 ../ \
            \"main\":{\"pid\":0,\"start_ticks\":0},",
        run: |bytes| {
            assert!(DriverState::decode(VERSION + 1, bytes).is_err());
            match DriverState::decode(VERSION, bytes) {
                Ok(state) => {
                    assert_eq!(
                        DriverState::decode(VERSION, &state.encode()).unwrap(),
                        state
                    );
                    if let Some(unit) = UnitName::existing(&state.unit) {
                        assert!(!unit.as_str().contains('/'));
                    }
                }
                Err(error) => assert!(error.to_string().len() < 400, "{error}"),
            }
        },
    }
    .fuzz();
}

/// Of a record, the magic number, the checksum and the body.
const WHOLE_BYTES: usize = 64;

#[test]
fn exit_record() {
    Target {
        name: "exit_record",
        samples: &[],
        tokens: b"exec2rc1 \0\0\0\0\0\0\0\0",
        run: |bytes| {
            match record::read(bytes) {
                Record::Open => assert_eq!(bytes[8..WHOLE_BYTES], [0; 56]),
                Record::Exited(exit) => {
                    assert_reads_back(&exit);
                }
                Record::Torn => {}
            }
            for end in 0..WHOLE_BYTES.min(bytes.len()) {
                assert_eq!(record::read(&bytes[..end]), Record::Torn);
            }
            let mut words = bytes
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
            let mut word = || words.next().unwrap_or(0);
            let exit = Exit {
                code: word() as i32,
                signal: word() as i32,
                oom_kills: word(),
                memory_peak_bytes: word(),
                memory_max_bytes: word(),
                ended_unix_nanos: word(),
                was_terminated: word() % 2 == 1,
            };
            let mut page = assert_reads_back(&exit);
            page[bytes.len() % WHOLE_BYTES] ^= bytes.last().copied().unwrap_or(0).max(1);
            assert_eq!(
                record::read(&page),
                Record::Torn,
                "{exit:?} with a byte changed"
            );
        },
    }
    .fuzz();
}

fn assert_reads_back(exit: &Exit) -> [u8; record::SIZE_BYTES] {
    let mut page = record::open();
    record::write(&mut page, exit);
    assert_eq!(record::read(&page), Record::Exited(*exit));
    page
}

#[test]
fn helper_report() {
    Target {
        name: "helper_report",
        samples: &[],
        tokens: b"F E X P S \x84 \xa4step \xa5errno \xa7subject \xa4note \xc0 \xdb\xff\xff\xff\xff \xdd\xff\xff\xff\xff \xa4Exec",
        run: |bytes| {
            let heard = hear(bytes);
            if bytes.is_empty() {
                assert!(heard.is_none());
            }
            let Some(Message::Failed(failure)) = heard else {
                return;
            };
            assert!(failure.to_string().len() < 64 << 10);
            if bytes[0] == b'F' {
                let mut again = b"F".to_vec();
                again.extend(rmp_serde::to_vec_named(&failure).unwrap());
                // A note may grow by the names of the keys.
                if again.len() <= PACKET_BYTES {
                    assert_eq!(hear(&again), Some(Message::Failed(failure)));
                }
            }
        },
    }
    .fuzz();
}

const PACKET_BYTES: usize = 8 << 10;

/// What the plugin makes of one packet, which the kernel cuts to the length that is read.
fn hear(packet: &[u8]) -> Option<Message> {
    let (ours, helpers) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    if !packet.is_empty() {
        send(
            &helpers,
            &packet[..packet.len().min(2 * PACKET_BYTES)],
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }
    drop(helpers);
    let (message, descriptor) = report::receive(ours.as_fd()).ok()??;
    assert!(descriptor.is_none());
    Some(message)
}
