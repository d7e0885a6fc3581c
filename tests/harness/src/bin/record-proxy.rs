//! Put into a real agent's plugin_dir in the plugin's place, with `args = ["PLUGIN", "DIRECTORY"]` in the plugin block: runs the
//! plugin and keeps every request and answer as a file. Further arguments are the plugin's.

use anyhow::{Result, bail};
use harness::nomad::record;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [plugin, directory, rest @ ..] = args.as_slice() else {
        bail!("usage: record-proxy PLUGIN DIRECTORY [ARGUMENT...]");
    };
    record::serve(plugin.as_ref(), rest, directory.as_ref()).await
}
