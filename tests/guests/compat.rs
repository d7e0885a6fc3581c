//! What jobs written for HashiCorp's exec2 rely on and no other case shows: rows of tests/compatibility.md.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use anyhow::{Context as _, Result, ensure};
use harness::guest::{Case, Context};
use harness::nomad::proto::driver::{
    DestroyTaskRequest, NetworkIsolationSpec, network_isolation_spec::NetworkIsolationMode,
};

use crate::case;
use crate::nomad::{Job, Scope, agent, printed, proc_file, said, until};

pub const CASES: &[Case] = &[
    case!(Speed, Ours, relative_paths_are_those_of_the_tasks_directory),
    case!(Speed, Ours, a_variable_without_a_value_stays_one),
    case!(
        Speed,
        Ours,
        a_socket_of_the_agents_is_reached_by_its_relative_path
    ),
    case!(Speed, Ours, a_misspelt_kill_signal_still_stops_the_task),
    case!(Speed, Ours, a_running_task_is_destroyed_by_force_only),
    case!(Speed, Ours, a_task_joins_the_network_of_its_allocation),
    case!(Speed, Ours, no_file_of_a_task_s_own_forges_its_exit_code),
    case!(Both, Ours, the_supervisor_costs_a_task_next_to_nothing),
];

fn relative_paths_are_those_of_the_tasks_directory(context: &Context) -> Result<()> {
    let script = "set -e
        for dir in local secrets tmp alloc/data; do
          echo word > $dir/file; cat $dir/file; rm $dir/file
        done
        [ local/. -ef \"$NOMAD_TASK_DIR\" ] && [ alloc/. -ef \"$NOMAD_ALLOC_DIR\" ]
        [ secrets/. -ef \"$NOMAD_SECRETS_DIR\" ] && [ tmp/. -ef \"$TMPDIR\" ] && [ /tmp/. -ef \"$TMPDIR\" ]
        [ -r alloc/logs ] && [ ! -w alloc/logs ]";
    context.block_on(async {
        let agent = agent(context).await?;
        let seen = printed(&agent, &Job::shell(script)).await?;
        ensure!(seen == "word\n".repeat(4), "{seen}");
        agent.finish().await
    })
}

fn a_variable_without_a_value_stays_one(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::command("env", &[]).task("env {\n EMPTY = \"\"\n }");
        let seen = printed(&agent, &job).await?;
        ensure!(seen.lines().any(|line| line == "EMPTY="), "{seen}");
        agent.finish().await
    })
}

/// As Envoy does in bridge mode, whose target is `unix://alloc/tmp/consul_grpc.sock`.
fn a_socket_of_the_agents_is_reached_by_its_relative_path(context: &Context) -> Result<()> {
    let script = r#"use Socket; socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die;
        until (connect($s, pack_sockaddr_un("alloc/tmp/consul_grpc.sock"))) {
            die "$!" unless $!{ENOENT}; select(undef, undef, undef, 0.05);
        }
        print "connected\n";"#;
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::command("perl", &["-e", script]);
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        // Bound under another name, as its mode comes after the bind.
        let dir = task.paths().alloc.join("tmp");
        let (bound, path) = (dir.join("bound.sock"), dir.join("consul_grpc.sock"));
        let _listener = UnixListener::bind(&bound)?;
        fs::set_permissions(&bound, fs::Permissions::from_mode(0o777))?;
        fs::rename(&bound, &path)?;
        let exit = task.wait().await?;
        ensure!(exit.success(), "{exit:?}: {}", alloc.stderr("t")?);
        ensure!(alloc.stdout("t")? == "connected\n");
        agent.finish().await
    })
}

fn a_misspelt_kill_signal_still_stops_the_task(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell("trap 'exit 8' INT; echo up; while :; do sleep 0.05; done")
            .task("kill_signal = \"SIGNONSENSE\"");
        let alloc = agent.run(&job.text()).await?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let exit = alloc.only_task()?.stop().await?;
        ensure!((exit.code, exit.signal) == (8, 0), "{exit:?}");
        agent.finish().await
    })
}

fn a_running_task_is_destroyed_by_force_only(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        let mut driver = agent.connection()?.driver();
        let mut destroy = async |force| {
            let task_id = task.id();
            driver
                .destroy_task(DestroyTaskRequest { task_id, force })
                .await
        };
        let refused = destroy(false).await.err().context("it was destroyed")?;
        ensure!(
            refused.message() == "cannot destroy running task",
            "{refused}"
        );
        ensure!(scope.processes()?.len() == 2, "the task was touched");
        destroy(true).await?;
        scope.expect_gone()?;
        agent.finish().await
    })
}

fn a_task_joins_the_network_of_its_allocation(context: &Context) -> Result<()> {
    let name = "exec2-case";
    let path = format!("/run/netns/{name}");
    said("ip", &["netns", "add", name])?;
    let done = context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::command("sleep", &["600"]).text();
        let with = |mode: NetworkIsolationMode, path: &str| NetworkIsolationSpec {
            mode: mode.into(),
            path: path.into(),
            ..NetworkIsolationSpec::default()
        };
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net"));
        let host = namespace(1)?;
        let spec = with(NetworkIsolationMode::Group, &path);
        let alloc = agent
            .run_with(&job, |task| {
                task.network_isolation_spec = Some(spec.clone())
            })
            .await?;
        let main = Scope::of(alloc.only_task()?)?.main()?;
        ensure!(namespace(main)? != host, "it has the host's network");
        let devices = fs::read_to_string(format!("/proc/{main}/net/dev"))?;
        let devices: Vec<_> = devices.lines().skip(2).collect();
        ensure!(
            devices.len() == 1 && devices[0].trim().starts_with("lo:"),
            "{devices:?}"
        );
        alloc.stop().await?;

        // Without a spec, and with the host's, it has the host's.
        for spec in [None, Some(with(NetworkIsolationMode::Host, ""))] {
            let alloc = agent
                .run_with(&job, |task| task.network_isolation_spec = spec.clone())
                .await?;
            let main = Scope::of(alloc.only_task()?)?.main()?;
            ensure!(namespace(main)? == host, "{spec:?}");
            alloc.stop().await?;
        }
        agent.finish().await
    });
    said("ip", &["netns", "delete", name])?;
    // The directory of named namespaces is a mount of ip's own.
    said("umount", &["/run/netns"])?;
    done
}

fn no_file_of_a_task_s_own_forges_its_exit_code(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let job = Job::shell(
            "for dir in local alloc/data tmp .; do echo 0 > $dir/.exit_status.txt; done 2>/dev/null
             echo up; while ! [ -e local/go ]; do sleep 0.05; done; exit 9",
        );
        let alloc = agent.run(&job.text()).await?;
        let task = alloc.only_task()?;
        let scope = Scope::of(task)?;
        until("the task is up", || {
            (alloc.stdout("t").ok()? == "up\n").then_some(())
        })
        .await?;
        let lost = agent.restart().await?;
        ensure!(lost.is_empty() && task.exit().is_none(), "{lost:?}");
        let crashed = agent.crash().await;
        crashed.kill_plugin().await?;
        fs::write(task.paths().local.join("go"), "")?;
        until("the scope is empty", || (!scope.dir.exists()).then_some(())).await?;
        let (agent, lost) = crashed.reattach().await?;
        ensure!(lost.is_empty(), "{lost:?}");
        let exit = task.wait().await?;
        ensure!((exit.code, exit.signal) == (9, 0), "{exit:?}");
        agent.finish().await
    })
}

/// What is its own and no shared page of the driver's file.
fn the_supervisor_costs_a_task_next_to_nothing(context: &Context) -> Result<()> {
    context.block_on(async {
        let agent = agent(context).await?;
        let alloc = agent.run(&Job::command("sleep", &["600"]).text()).await?;
        let supervisor = Scope::of(alloc.only_task()?)?.supervisor()?;
        let rollup = proc_file(supervisor, "smaps_rollup")?;
        let private: u64 = rollup
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        context.note(format!("private memory of the supervisor: {private} KiB"));
        ensure!(private > 0 && private < 2_048, "{rollup}");
        agent.finish().await
    })
}
