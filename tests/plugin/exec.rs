//! The messages of a session, as Nomad sends and reads them.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use nomad_driver_exec2::proto::hashicorp::nomad::plugins::drivers::proto as wire;
use wire::exec_task_streaming_request::{Setup, TerminalSize};

use crate::client::DRIVER;
use crate::served::{ID, Served, serve, task};

type Request = wire::ExecTaskStreamingRequest;
type Response = wire::ExecTaskStreamingResponse;

fn setup(id: &str, command: &str, tty: bool) -> Request {
    let setup = Setup {
        task_id: id.into(),
        command: vec![command.into()],
        tty,
    };
    Request {
        setup: Some(setup),
        ..Request::default()
    }
}

fn stdin(data: &[u8], close: bool) -> Request {
    let data = data.to_vec();
    Request {
        stdin: Some(wire::ExecTaskStreamingIoOperation { data, close }),
        ..Request::default()
    }
}

fn size(height: i32, width: i32) -> Request {
    Request {
        tty_size: Some(TerminalSize { height, width }),
        ..Request::default()
    }
}

/// A session with these as the first messages; more can be sent.
async fn open(
    served: &Served,
    first: Vec<Request>,
) -> Result<(mpsc::Sender<Request>, Streaming<Response>), Status> {
    let (sender, receiver) = mpsc::channel(16);
    for request in first {
        sender.send(request).await.unwrap();
    }
    let requests = ReceiverStream::new(receiver);
    let answers = served
        .client
        .pour(DRIVER, "ExecTaskStreaming", requests)
        .await?;
    Ok((sender, answers))
}

/// All that is said, by stream, and the code at the end.
async fn rest(mut answers: Streaming<Response>) -> Result<(Vec<u8>, Vec<u8>, i32), Status> {
    let (mut stdout, mut stderr, mut closed) = (Vec::new(), Vec::new(), 0);
    while let Some(answer) = answers.message().await? {
        for (said, all) in [(&answer.stdout, &mut stdout), (&answer.stderr, &mut stderr)] {
            if let Some(said) = said {
                all.extend(&said.data);
                closed += i32::from(said.close);
            }
        }
        if answer.exited {
            assert_eq!(closed, 2, "both streams end before the session does");
            let code = answer.result.expect("Nomad dereferences it").exit_code;
            assert!(answers.message().await?.is_none());
            return Ok((stdout, stderr, code));
        }
    }
    panic!("no end")
}

#[tokio::test]
async fn bytes_go_both_ways_and_heartbeats_go_nowhere() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let first = vec![
        setup(ID, "cat", false),
        Request::default(),
        stdin(b"\0\xff", false),
        Request::default(),
        stdin(b"end", true),
    ];
    let (_open, answers) = open(&served, first).await.unwrap();
    assert_eq!(
        rest(answers).await.unwrap(),
        (b"\0\xffend".to_vec(), vec![], 3)
    );
    let verbs = served.tasks.verbs.lock().unwrap();
    assert_eq!(*verbs, ["exec [\"cat\"] Pipes"]);
}

#[tokio::test]
async fn a_terminal_has_its_size_from_the_start_and_no_impossible_one() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let first = vec![
        setup(ID, "sh", true),
        size(24, 80),
        size(-1, 1 << 20),
        stdin(b"", true),
    ];
    let (_open, answers) = open(&served, first).await.unwrap();
    let (_, sizes, _) = rest(answers).await.unwrap();
    assert_eq!(
        String::from_utf8(sizes).unwrap(),
        "WindowSize { rows: 24, columns: 80 }WindowSize { rows: 0, columns: 65535 }"
    );
    // Without one a session starts as well.
    let (sender, answers) = open(&served, vec![setup(ID, "sh", true)]).await.unwrap();
    sender.send(stdin(b"", true)).await.unwrap();
    rest(answers).await.unwrap();
    let verbs = served.tasks.verbs.lock().unwrap();
    assert_eq!(
        *verbs,
        [
            "exec [\"sh\"] Terminal(WindowSize { rows: 24, columns: 80 })",
            "exec [\"sh\"] Terminal(WindowSize { rows: 0, columns: 0 })",
        ]
    );
}

#[tokio::test]
async fn a_slow_client_gets_all_of_it() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let (_open, answers) = open(&served, vec![setup(ID, "loud", false), stdin(b"", true)])
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (stdout, _, _) = rest(answers).await.unwrap();
    assert_eq!(stdout.split(|byte| *byte == b'\n').count(), 10_001);
    assert!(stdout.ends_with(b"\n9999\n"));
}

#[tokio::test]
async fn what_is_no_session_is_refused_with_a_sentence() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let no_setup = "the first message of a session must be its setup, with task and command";
    for (first, words) in [
        (vec![Request::default()], no_setup),
        (vec![stdin(b"x", false), setup(ID, "sh", false)], no_setup),
        (vec![size(1, 1)], no_setup),
        (
            vec![setup("ghost", "sh", false)],
            "task not found for given id: ghost",
        ),
    ] {
        let error = open(&served, first).await.err().unwrap();
        assert_eq!((error.message(), error.code()), (words, Code::Unknown));
    }
    let (_, answers) = open(
        &served,
        vec![setup(ID, "sh", false), setup(ID, "sh", false)],
    )
    .await
    .unwrap();
    let error = rest(answers).await.err().unwrap();
    assert_eq!(
        error.message(),
        "a session has one setup, its first message"
    );
    served.tasks.sessions_closed.notified().await;
}

#[tokio::test]
async fn a_client_that_goes_away_lets_go_of_its_session() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let (sender, answers) = open(&served, vec![setup(ID, "quiet", false)])
        .await
        .unwrap();
    drop((sender, answers));
    served.tasks.sessions_closed.notified().await;
}

#[tokio::test]
async fn exec_task_gives_the_end_of_what_was_said_and_the_code() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let request = |id: &str, command: &str, seconds| wire::ExecTaskRequest {
        task_id: id.into(),
        command: vec![command.into()],
        timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    for seconds in [0, 5] {
        let answer: wire::ExecTaskResponse = served
            .driver("ExecTask", request(ID, "loud", seconds))
            .await
            .unwrap();
        assert_eq!(answer.result.unwrap().exit_code, 3);
        assert_eq!(answer.stdout.len(), 4096);
        assert!(answer.stdout.ends_with(b"\n9999\n"));
        assert!(answer.stderr.is_empty());
    }
    let late: Result<wire::ExecTaskResponse, Status> =
        served.driver("ExecTask", request(ID, "quiet", 1)).await;
    let late = late.unwrap_err();
    assert!(
        late.message().starts_with("context deadline exceeded"),
        "{late}"
    );
    served.tasks.sessions_closed.notified().await;
    let ghost: Result<wire::ExecTaskResponse, Status> =
        served.driver("ExecTask", request("ghost", "x", 1)).await;
    assert_eq!(
        ghost.unwrap_err().message(),
        "task not found for given id: ghost"
    );
}

#[tokio::test]
async fn a_session_that_does_not_read_keeps_no_other_call_waiting() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let mut stuck = Vec::new();
    for _ in 0..4 {
        let (sender, answers) = open(&served, vec![setup(ID, "quiet", false)])
            .await
            .unwrap();
        let flood = tokio::spawn(async move {
            for _ in 0..64 {
                if sender.send(stdin(&[0; 64 << 10], false)).await.is_err() {
                    return;
                }
            }
        });
        stuck.push((flood, answers));
    }
    // So that it has sent what the connection takes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let large = wire::SignalTaskRequest {
        task_id: ID.into(),
        signal: "x".repeat(256 << 10),
    };
    let answer: Result<wire::SignalTaskResponse, Status> =
        tokio::time::timeout(Duration::from_secs(10), served.driver("SignalTask", large))
            .await
            .expect("it is kept waiting");
    answer.unwrap();
    stuck.iter().for_each(|(flood, _)| flood.abort());
}

#[tokio::test]
async fn input_comes_in_parts() {
    let served = serve().await;
    served.start(task("x")).await.unwrap();
    let first = vec![setup(ID, "cat", false), stdin(&[0; (1 << 20) + 1], false)];
    let (_open, answers) = open(&served, first).await.unwrap();
    let error = rest(answers).await.unwrap_err();
    assert!(error.message().contains("send it in parts"), "{error}");
}
