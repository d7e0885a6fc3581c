//! Compiles `proto/` into Rust, without protoc: the messages and the server half of every service.

use std::error::Error;
use std::fs;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut files = Vec::new();
    for entry in fs::read_dir("proto")? {
        files.push(entry?.path());
    }
    files.sort();
    let descriptors = protox::compile(&files, ["proto"])?;
    tonic_prost_build::configure()
        .build_client(false)
        .codec_path("crate::plugin::codec::SmallBuffers")
        .include_file("proto.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
