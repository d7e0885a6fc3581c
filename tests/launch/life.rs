//! From start to exit record.

use crate::stage::Stage;

#[test]
fn a_command_runs_and_its_exit_code_is_recorded() {
    for code in [0, 7] {
        let stage = Stage::new();
        let outcome = stage.run(&stage.script(&format!("echo hello; echo oops >&2; exit {code}")));
        assert_eq!((outcome.exit.code, outcome.exit.signal), (code, 0));
        assert_eq!((&*outcome.stdout, &*outcome.stderr), ("hello\n", "oops\n"));
        assert!(outcome.exit.ended_unix_nanos > 0);
    }
}
