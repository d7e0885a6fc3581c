//! Compiles `proto/` into Rust, without protoc: the messages and the client half of every service. And the command that the
//! benchmark has started, static and without libc whatever the profile.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

const STAMP: &str = "src/bench/stamp.rs";
/// No libc, no interpreter, no relocations: an exec of it maps two pages.
const STAMP_OPTIONS: &[&str] = &[
    "-Copt-level=2",
    "-Cpanic=abort",
    "-Cstrip=symbols",
    "-Crelocation-model=static",
    "-Clink-args=-nostartfiles -nostdlib -static",
];

fn main() -> Result<(), Box<dyn Error>> {
    let proto = "../../proto";
    println!("cargo:rerun-if-changed={proto}");
    let mut files = Vec::new();
    for entry in fs::read_dir(proto)? {
        files.push(entry?.path());
    }
    files.sort();
    let descriptors = protox::compile(&files, [proto])?;
    tonic_prost_build::configure()
        .build_server(false)
        .include_file("proto.rs")
        .compile_fds(descriptors)?;
    stamp()
}

fn stamp() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={STAMP}");
    let compiled = Command::new(std::env::var("RUSTC")?)
        .args(["--edition=2024", "--crate-name=stamp", "--target"])
        .arg(std::env::var("TARGET")?)
        .args(STAMP_OPTIONS)
        .arg(STAMP)
        .arg("-o")
        .arg(Path::new(&std::env::var("OUT_DIR")?).join("stamp"))
        .status()?;
    match compiled.success() {
        true => Ok(()),
        false => Err(format!("{STAMP}: {compiled}").into()),
    }
}
