//! `netctl run`: what the command finds, how it ends, and that nothing remains. Needs root.
//!
//! The agent is in memory, so there is no interface: the namespaces are empty and nothing is sent.

#[path = "support/memory.rs"]
mod memory;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use memory::Agent;
use netctl::api::ErrorCode;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, tcgetpgrp};

/// Longer than anything here takes; reaching it is a failure.
const DEADLINE: Duration = Duration::from_secs(20);

fn agent() -> Agent {
    let agent = Agent::start();
    let create = ["network", "create", "web", "--subnet", "10.9.0.0/24"];
    assert!(netctl(&agent).args(create).stdout(Stdio::null()).status().unwrap().success());
    agent
}

fn netctl(agent: &Agent) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
    command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.env("NETCTL_SOCKET", &agent.socket).stdin(Stdio::null());
    command
}

/// `netctl run` of a shell script on the network, with further options.
fn run(agent: &Agent, options: &[&str], script: &str) -> Command {
    let mut command = netctl(agent);
    command.args(["run", "--network", "web", "--name", "a"]).args(options);
    command.args(["--", "sh", "-c", script]);
    command
}

/// A process that is killed when it takes too long, and when the test ends without it.
struct Running {
    child: Option<Child>,
    pid: Pid,
    _watched: Sender<()>,
}

impl Running {
    fn spawn(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let (watched, ended) = channel();
        std::thread::spawn(move || {
            if ended.recv_timeout(DEADLINE) == Err(RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self { child: Some(child), pid, _watched: watched }
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Waits for its end.
    fn status(&mut self) -> ExitStatus {
        self.child().wait().unwrap()
    }

    /// Waits for its end, and gives what it has written.
    fn output(mut self) -> Output {
        self.child.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take()
            && let Ok(None) = child.try_wait()
        {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

fn output(agent: &Agent, options: &[&str], script: &str) -> Output {
    let mut command = run(agent, options, script);
    Running::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped())).output()
}

/// What a script prints that succeeds without complaint.
fn printed(agent: &Agent, options: &[&str], script: &str) -> String {
    let output = output(agent, options, script);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && complaint.is_empty(), "{:?}: {complaint}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A started `netctl run` whose script has printed `ready` as its first line.
fn started(command: &mut Command) -> (Running, ChildStdout) {
    let mut child = Running::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut stdout = child.child().stdout.take().unwrap();
    let mut line = [0; 6];
    stdout.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    (child, stdout)
}

fn namespace(pid: u32, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_str().unwrap().to_owned()
}

/// Process 1 of the namespaces: the only child of `netctl run`.
fn init_of(netctl: &Running) -> u32 {
    only_child(netctl.pid.as_raw() as u32).unwrap()
}

/// The child of a process that has one.
fn only_child(pid: u32) -> Option<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.trim().parse().ok()
}

/// Whether a process with this network namespace exists.
fn is_inhabited(netns: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut links = processes.filter_map(|entry| fs::read_link(entry.path().join("ns/net")).ok());
    links.any(|link| link == Path::new(netns))
}

fn nothing_remains(agent: &Agent) {
    let state = agent.memory.state();
    assert!(state.endpoints.is_empty(), "an endpoint remains");
}

#[test]
fn the_command_runs_in_namespaces_of_its_own_as_process_2() {
    let agent = agent();
    let script = "echo $$; for n in net mnt pid uts; do readlink /proc/$$/ns/$n; done";
    let text = printed(&agent, &[], script);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "2");
    for (line, kind) in lines[1..].iter().zip(["net", "mnt", "pid", "uts"]) {
        assert!(line.starts_with(kind) && *line != namespace(std::process::id(), kind), "{line}");
    }
    nothing_remains(&agent);
    assert_eq!(agent.memory.state().detached.len(), 1);
}

#[test]
fn the_agent_gets_the_namespace_that_the_command_is_in() {
    let agent = agent();
    let (mut child, _) = started(&mut run(&agent, &["--wait", "3s"], "echo ready; exec sleep 60"));
    let request = agent.memory.state().attached[0].clone();
    let seen = fs::read_link(&request.netns).unwrap();
    assert_eq!(seen.to_str().unwrap(), namespace(init_of(&child), "net"));
    assert_eq!(request.wait_ms, Some(3000));
    child.signal(Signal::SIGTERM);
    assert_eq!(child.status().code(), Some(143));
    nothing_remains(&agent);
}

#[test]
fn the_command_sees_its_own_files_processes_and_devices() {
    let agent = agent();
    let hosts = fs::read_to_string("/etc/hosts").unwrap();
    let script = "hostname; cat /etc/hostname; grep 10.9.0.7 /etc/hosts; ls /sys/class/net | tr '\\n' ' '; \
                  ls -vd /proc/[0-9]* | head -2 | tr '\\n' ' '; grep -c '^nameserver *127' /etc/resolv.conf; \
                  touch /etc/hosts && echo x >> /etc/hosts";
    let options = ["--ip", "10.9.0.7", "--hostname", "h.example"];
    let text = printed(&agent, &options, script);
    let expected = "h.example\nh.example\n10.9.0.7\th.example a\nlo /proc/1 /proc/2 0\n";
    assert_eq!(text, expected);
    assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), hosts, "the host's own file changed");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.lines().any(|line| line.starts_with("netctl ")), "{mounts}");
}

#[test]
fn the_host_name_is_the_endpoints_name() {
    assert_eq!(printed(&agent(), &[], "hostname"), "a\n");
}

#[test]
fn the_environment_names_network_endpoint_and_address() {
    let options = ["--env", "A=b c", "-e", "NETCTL_NETWORK=lie"];
    let script = "echo $NETCTL_ENDPOINT $NETCTL_NETWORK $NETCTL_ADDRESS $A";
    assert_eq!(printed(&agent(), &options, script), "a web 10.9.0.2 b c\n");
}

#[test]
fn the_commands_status_is_ours() {
    let agent = agent();
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 143)] {
        assert_eq!(output(&agent, &[], script).status.code(), Some(status), "{script}");
    }
    for (program, status) in [("/no/such/program", 127), ("/etc/hostname", 126)] {
        let mut command = netctl(&agent);
        let output = command.args(["run", "--network", "web", "--", program]).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{program}");
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert!(complaint.starts_with("netctl: cannot run") && complaint.contains(program));
    }
    nothing_remains(&agent);
}

#[test]
fn input_and_output_pass_through() {
    let agent = agent();
    let mut command = run(&agent, &[], "cat; echo done >&2");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running::spawn(&mut command);
    child.child().stdin.take().unwrap().write_all(b"through").unwrap();
    let output = child.output();
    assert_eq!((output.stdout, output.stderr), (b"through".to_vec(), b"done\n".to_vec()));
}

#[test]
fn an_attach_that_fails_leaves_nothing_and_runs_nothing() {
    let agent = agent();
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("mark");
    for (code, status) in [(ErrorCode::Exhausted, 5), (ErrorCode::Timeout, 6), (ErrorCode::Internal, 1)]
    {
        agent.memory.state().fail_next = Some(code);
        let output = output(&agent, &[], &format!("touch {}", mark.display()));
        assert_eq!(output.status.code(), Some(status));
        assert!(String::from_utf8(output.stderr).unwrap().starts_with("netctl: "));
        let requests = agent.memory.state().attached.clone();
        assert!(!requests.last().unwrap().netns.exists(), "process 1 remains");
    }
    assert!(!mark.exists());
    let mut command = netctl(&agent);
    let command = command.args(["--socket", "/nowhere/s", "run", "--network", "web", "--", "true"]);
    assert_eq!(command.status().unwrap().code(), Some(3));
}

#[test]
fn killing_netctl_kills_everything_inside() {
    let agent = agent();
    let script = "sleep 1000 & setsid sleep 1000 & (sleep 1000 & ) ; echo ready; wait";
    let (mut child, mut stdout) = started(&mut run(&agent, &[], script));
    let netns = namespace(init_of(&child), "net");
    assert!(is_inhabited(&netns));
    child.signal(Signal::SIGKILL);
    assert_eq!(child.status().signal(), Some(9));
    wait_until("everything inside is gone", || !is_inhabited(&netns));
    assert_eq!(stdout.read(&mut [0]).unwrap(), 0, "somebody still has the output");
}

#[test]
fn what_the_command_leaves_running_ends_with_it() {
    let agent = agent();
    let script = "readlink /proc/self/ns/net; setsid sleep 1000 >/dev/null 2>&1 & \
                  (trap '' TERM HUP INT; sleep 1000) >/dev/null 2>&1 & exit 3";
    let output = output(&agent, &[], script);
    assert_eq!(output.status.code(), Some(3));
    let netns = String::from_utf8(output.stdout).unwrap();
    assert!(netns.starts_with("net:["), "{netns}");
    assert!(!is_inhabited(netns.trim()));
}

#[test]
fn orphans_are_reaped_by_process_1() {
    // The grandchild's parent ends first, so process 1 inherits it and must wait for it.
    let script = "pid=$(sh -c 'sleep 0.01 > /dev/null & echo $!'); \
                  while [ -e /proc/$pid ]; do sleep 0.01; done; echo reaped";
    assert_eq!(printed(&agent(), &[], script), "reaped\n");
}

#[test]
fn signals_reach_the_command_once() {
    let agent = agent();
    for (signal, name) in [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGWINCH, "WINCH"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
    ] {
        let script = format!(
            "n=0; trap 'n=$((n+1))' {name}; trap 'echo $n; exit 9' ALRM; echo ready; \
             while [ $n = 0 ]; do sleep 0.01; done; kill -ALRM $$; sleep 1"
        );
        let (mut child, mut stdout) = started(&mut run(&agent, &[], &script));
        child.signal(signal);
        assert_eq!(child.status().code(), Some(9), "{name}");
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text, "1\n", "{name}");
    }
    nothing_remains(&agent);
}

#[test]
fn a_signal_from_inside_to_process_1_does_not_come_back() {
    // Process 1 reads signals by their number: when it has reaped the orphan (SIGCHLD) it has seen
    // the SIGUSR1 as well.
    let script = "trap 'echo back' USR1; kill -USR1 1; \
                  pid=$(sh -c 'sleep 0.01 > /dev/null & echo $!'); \
                  while [ -e /proc/$pid ]; do sleep 0.01; done; echo alone";
    assert_eq!(printed(&agent(), &[], script), "alone\n");
}

#[test]
fn a_signal_while_attaching_ends_it_and_undoes_the_attach() {
    let agent = agent();
    let gate = &agent.memory.gate;
    gate.forget_permits(gate.available_permits());
    let mut child = Running::spawn(&mut run(&agent, &[], "true"));
    wait_until("it attaches", || !agent.memory.state().attached.is_empty());
    let netns = agent.memory.state().attached[0].netns.clone();
    child.signal(Signal::SIGTERM);
    wait_until("process 1 is gone", || !netns.exists());
    gate.add_permits(1);
    assert_eq!(child.status().code(), Some(143));
    nothing_remains(&agent);
    assert_eq!(agent.memory.state().detached.len(), 1);
}

#[test]
fn a_detach_that_fails_is_told_and_changes_no_status() {
    let agent = agent();
    let (child, _stdout) = started(&mut run(&agent, &[], "echo ready; sleep 0.1; exit 4"));
    agent.memory.state().fail_next = Some(ErrorCode::Unavailable);
    let output = child.output();
    assert_eq!(output.status.code(), Some(4));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("endpoint a (") && complaint.contains("not detached"), "{complaint}");
}

/// `netctl run` as a shell's job on a terminal of its own; gives our end of the terminal.
fn on_terminal(agent: &Agent, script: &str) -> (Running, File) {
    let pty = openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = run(agent, &[], script);
    command.env("TERM", "dumb").stdin(end()).stdout(end()).stderr(end());
    // SAFETY: only calls that are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let child = Running::spawn(&mut command);
    (child, pty.master.into())
}

/// Reads a terminal until a text has come.
fn expect(terminal: &mut File, text: &str) -> String {
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.contains(text) {
        // A terminal whose other end is closed is an error (EIO).
        let count = terminal.read(&mut byte).unwrap_or(0);
        assert!(count == 1, "the terminal ended without {text:?}: {seen:?}");
        seen.push(char::from(byte[0]));
    }
    seen
}

#[test]
fn ctrl_c_reaches_the_command_and_not_netctl() {
    let agent = agent();
    let script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.01; done";
    let (mut child, mut terminal) = on_terminal(&agent, script);
    expect(&mut terminal, "ready");
    terminal.write_all(b"\x03").unwrap();
    expect(&mut terminal, "caught");
    assert_eq!(child.status().code(), Some(5));
    nothing_remains(&agent);
}

#[test]
fn ctrl_z_stops_netctl_with_the_command_and_both_go_on() {
    let agent = agent();
    let script = "echo ready; read line; echo got $line; exit 6";
    let (mut child, mut terminal) = on_terminal(&agent, script);
    expect(&mut terminal, "ready");
    terminal.write_all(b"\x1a").unwrap();
    let stopped = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert_eq!(stopped, WaitStatus::Stopped(child.pid, Signal::SIGSTOP));
    child.signal(Signal::SIGCONT);
    terminal.write_all(b"words\n").unwrap();
    expect(&mut terminal, "got words");
    assert_eq!(child.status().code(), Some(6));
}

#[test]
fn an_interactive_shell_has_job_control() {
    let agent = agent();
    let shell = "exec bash --norc --noprofile -i";
    let (mut child, mut terminal) = on_terminal(&agent, shell);
    let mut seen = expect(&mut terminal, "bash");
    terminal.write_all(b"sleep 1000 &\nkill %1; wait %1; echo status $?\n").unwrap();
    seen += &expect(&mut terminal, "status 143");
    terminal.write_all(b"sleep 1000\n").unwrap();
    let shell = only_child(init_of(&child)).unwrap();
    // Not before the job has the foreground, else the shell itself is meant.
    let in_front = || {
        let job = only_child(shell).filter(|job| {
            fs::read_to_string(format!("/proc/{job}/comm")).is_ok_and(|name| name == "sleep\n")
        });
        job.is_some_and(|job| tcgetpgrp(&terminal) == Ok(Pid::from_raw(job as i32)))
    };
    wait_until("sleep has the terminal", in_front);
    terminal.write_all(b"\x03").unwrap();
    terminal.write_all(b"echo status $?\nexit 8\n").unwrap();
    seen += &expect(&mut terminal, "status 130");
    assert!(!seen.contains("cannot set terminal") && !seen.contains("no job control"), "{seen}");
    assert_eq!(child.status().code(), Some(8));
}
