//! `netctl plan` as people and scripts use it, against an agent in memory.

#[path = "support/memory.rs"]
mod memory;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use memory::Agent;
use netctl::api::ErrorCode;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where nobody listens: whoever asks the agent ends with status 3.
const NOWHERE: &str = "/nowhere/netctl.sock";

/// A folder with some files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn command(socket: &Path, folder: &TempDir, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
    command.env_clear().env("NETCTL_SOCKET", socket).current_dir(folder.path());
    command.arg("plan").args(line.split_whitespace());
    command
}

fn plan(agent: &Agent, folder: &TempDir, line: &str) -> Output {
    command(&agent.socket, folder, line).output().unwrap()
}

/// What is told of files that cannot be used, which is before the agent is asked.
fn wrong(folder: &TempDir, line: &str) -> String {
    let output = command(Path::new(NOWHERE), folder, line).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty());
    text(&output.stderr)
}

/// The names of the networks of a plan that fits.
fn networks(agent: &Agent, folder: &TempDir, line: &str) -> Vec<String> {
    let output = plan(agent, folder, &format!("{line} -o json"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    let networks = verdict["networks"].as_array().unwrap();
    networks.iter().map(|network| network["name"].as_str().unwrap().to_owned()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn with_network(line: &str) -> Agent {
    let agent = Agent::start();
    netctl(&agent, line);
    agent
}

/// Another of the commands, which succeeds.
fn netctl(agent: &Agent, line: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
    command.env_clear().env("NETCTL_SOCKET", &agent.socket).args(line.split_whitespace());
    assert!(command.output().unwrap().status.success(), "{line}");
}

const WEB: &str = "networks: {default: {external: true, name: web}}\n";

#[test]
fn everything_wrong_in_all_files_is_told_at_once_and_before_the_agent_is_asked() {
    let folder = folder(&[
        ("a/stack.yml", "services:\n  web:\n    deploy:\n      replicas: many\n      mode: odd\n"),
        ("b.yml", "services: {web: {networks: [none]}}\n"),
        ("good.yml", "services: {web: {image: a}}\n"),
        ("latin.yml", ""),
        ("odd.env", "A=1\nnot a name\n"),
    ]);
    fs::write(folder.path().join("latin.yml"), b"services: {\xe4: {}}").unwrap();
    let told = wrong(&folder, "a/stack.yml b.yml good.yml latin.yml gone.yml . --env-file odd.env");
    let expected = [
        "odd.env:2:1: \"not a name\" is not the name of a variable: give NAME=VALUE",
        "a/stack.yml:4:17: services.web.deploy.replicas: \"many\" is not a number",
        "a/stack.yml:5:13: services.web.deploy.mode: \"odd\" is none of replicated, global, \
         replicated-job, global-job",
        "b.yml:1:29: services.web.networks[0]: there is no network \"none\" under the file's networks",
        "latin.yml: cannot be read: it is not a text in UTF-8",
        "gone.yml: cannot be read: No such file or directory (os error 2)",
        ".: cannot be read: Is a directory (os error 21)",
        "nothing is planned: correct these 7 first",
    ];
    assert_eq!(told, expected.map(|line| format!("netctl: {line}\n")).concat());
    assert!(wrong(&folder, "good.yml b.yml --project x").contains("--project names one stack"));
    assert!(wrong(&folder, "- -").contains("once only"));
    let output = command(Path::new(NOWHERE), &folder, "good.yml").output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn what_fits_is_a_table_with_bars() {
    let agent = with_network("network create web --subnet 10.9.0.0/28");
    let text_of = "\
networks: {default: {external: true, name: web}, own: }
services:
  a: {deploy: {replicas: 3, update_config: {order: start-first}}}
  b: {networks: [own]}
";
    let folder = folder(&[("shop/stack.yml", text_of)]);
    let output = plan(&agent, &folder, "shop/stack.yml");
    let expected = "\
NETWORK    NEEDED   ENDPOINTS   SURGE   VIPS   FREE             FITS   SHORT   MORE STACKS
shop_own   2        1           0       1      253 (new, /24)   yes    0       125
web        5        3           1       1      13               yes    0       1

shop_own   [........................]   0 %
web        [#########...............]  38 %
";
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), expected.to_owned()));
    assert!(output.stderr.is_empty());
}

#[test]
fn a_network_that_is_made_is_as_large_as_the_agent_s_pool_says() {
    let agent = Agent::start();
    agent.memory.state().settings.pool_prefix = 28;
    let text_of =
        "services: {a: {scale: 13}}\nnetworks: {other: {ipam: {config: [{subnet: 10.7.0.0/28}]}}}";
    let folder = folder(&[("s/a.yml", text_of), ("s/small.yml", &text_of.replace("13", "12"))]);
    let output = plan(&agent, &folder, "s/a.yml --project s");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(text(&output.stderr).contains("short by 1 IPv4 address: 14 needed, 13 free"), "{output:?}");
    assert!(text(&output.stdout).contains("13 (new, /28)"), "{output:?}");
    let output = plan(&agent, &folder, "s/small.yml -o json");
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    let family = &verdict["networks"][0]["families"][0];
    assert_eq!(family["pool"], json!({"prefix": 28, "assumed": false}));
    agent.memory.state().settings.pool_prefix = 23;
    let output = plan(&agent, &folder, "s/a.yml --project s");
    assert!(output.status.success() && text(&output.stdout).contains("509 (new, /23)"), "{output:?}");
}

#[test]
fn of_an_agent_that_does_not_tell_its_pool_the_usual_one_is_assumed_and_shown() {
    let agent = Agent::start();
    agent.memory.state().tells_no_settings = true;
    let folder = folder(&[("s/stack.yml", "services: {a: {image: a}}")]);
    let output = plan(&agent, &folder, "s/stack.yml");
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stdout).contains("253 (new, /24 assumed)"), "{output:?}");
    let output = plan(&agent, &folder, "s/stack.yml -o json");
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pool = &verdict["networks"][0]["families"][0]["pool"];
    assert_eq!(*pool, json!({"prefix": 24, "assumed": true}));
}

#[test]
fn what_does_not_fit_is_status_5_and_says_how_much_is_missing() {
    let agent = with_network("network create web --subnet 10.9.0.0/28 --subnet fd00::/64");
    let folder = folder(&[("stack.yml", &format!("{WEB}services: {{a: {{scale: 20}}}}"))]);
    let output = plan(&agent, &folder, "stack.yml");
    assert_eq!(output.status.code(), Some(5));
    let expected = "netctl: this does not fit\n        network web is short by 8 IPv4 addresses: 21 \
                    needed, 13 free; add a subnet (netctl \
                    network expand web --subnet CIDR), or deploy less\n";
    assert_eq!(text(&output.stderr), expected);
    let table = text(&output.stdout);
    assert!(table.contains("web       21       20          0       1      13     no     8"), "{table}");
    assert!(table.contains("[########################] 162 %"), "{table}");

    let output = plan(&agent, &folder, "-o json stack.yml");
    assert_eq!(output.status.code(), Some(5));
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&verdict["fits"], &verdict["networks"][0]["families"][0]["short"]),
        (&json!(false), &json!(8))
    );
    assert_eq!(verdict["networks"][0]["families"][1]["fits"], true);
}

#[test]
fn endpoints_that_are_there_are_not_free() {
    let agent = with_network("network create web --subnet 10.9.0.0/28");
    let folder = folder(&[("stack.yml", &format!("{WEB}services: {{a: {{scale: 12}}}}"))]);
    assert!(plan(&agent, &folder, "stack.yml").status.success());
    netctl(&agent, "endpoint attach --network web --netns /run/netns/a");
    let output = plan(&agent, &folder, "stack.yml");
    assert!(text(&output.stderr).contains("short by 1 IPv4 address: 13 needed, 12 free"), "{output:?}");
}

#[test]
fn what_the_agent_refuses_is_the_status_of_the_plan() {
    let agent = Agent::start();
    let folder = folder(&[("stack.yml", "services: {a: {image: a}}")]);
    agent.memory.state().fail_next = Some(ErrorCode::Unavailable);
    let output = plan(&agent, &folder, "stack.yml");
    assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(6), true), "{output:?}");
}

#[test]
fn nothing_fits_while_nobody_knows_how_the_addresses_are_used() {
    let agent = with_network("network create web --subnet 10.9.0.0/28");
    let folder = folder(&[
        ("web.yml", &format!("{WEB}services: {{a: {{image: a}}}}")),
        ("own/stack.yml", "services: {a: {image: a}}"),
    ]);
    agent.memory.state().store_away = true;
    // Whether the stack's own network is there is not known either.
    for (file, network) in [("web.yml", "web"), ("own/stack.yml", "own_default")] {
        let output = plan(&agent, &folder, file);
        assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(6), true), "{output:?}");
        let told = text(&output.stderr);
        let expected = format!("the use of network {network} is not known now");
        assert!(told.contains(&expected) && told.contains("its store (memory)"), "{told}");
        let kept = plan(&agent, &folder, &format!("{file} --reserve deploy"));
        assert_eq!(kept.status.code(), Some(6), "{kept:?}");
    }
    assert!(agent.memory.state().reserved.is_empty());
    agent.memory.state().store_away = false;
    assert!(plan(&agent, &folder, "web.yml own/stack.yml").status.success());
}

#[test]
fn an_empty_network_with_more_addresses_than_can_be_counted_is_empty() {
    let agent = with_network("network create web --subnet fd00::/48");
    let folder = folder(&[("stack.yml", &format!("{WEB}services: {{a: {{image: a}}}}"))]);
    let table = text(&plan(&agent, &folder, "stack.yml").stdout);
    assert!(table.contains("web   [........................]   0 %"), "{table}");
}

#[test]
fn an_external_network_that_is_not_there_is_status_4() {
    let agent = Agent::start();
    let folder = folder(&[("stack.yml", &format!("{WEB}services: {{a: {{scale: 20}}}}"))]);
    let output = plan(&agent, &folder, "stack.yml");
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("make it with netctl network create web"), "{output:?}");
    assert!(text(&output.stdout).contains("no network"), "{output:?}");
}

#[test]
fn global_services_run_on_the_nodes_that_are_given_or_known() {
    let agent = Agent::start();
    let folder =
        folder(&[("stack.yml", "services: {a: {deploy: {mode: global, endpoint_mode: dnsrr}}}")]);
    for (line, expected) in [("stack.yml", 2), ("stack.yml --nodes 40", 40)] {
        let output = plan(&agent, &folder, &format!("{line} -o json"));
        let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(verdict["networks"][0]["needed"], expected, "{line}");
    }
}

#[test]
fn a_stack_is_called_as_asked_or_as_its_file_says_or_as_its_folder_or_file() {
    let agent = Agent::start();
    let plain = "services: {a: {image: a}}";
    let named = format!("name: named\n{plain}");
    let folder = folder(&[
        ("Shop.1/stack.yml", plain),
        ("mail/a.yml", plain),
        ("mail/b.yml", plain),
        ("mail/c.yml", &named),
    ]);
    for (line, expected) in [
        ("Shop.1/stack.yml", &["shop1_default"][..]),
        ("mail/../Shop.1/stack.yml", &["shop1_default"]),
        ("mail/a.yml", &["mail_default"]),
        ("mail/a.yml Shop.1/stack.yml", &["mail_default", "shop1_default"]),
        ("mail/a.yml mail/b.yml", &["a_default", "b_default"]),
        ("mail/c.yml", &["named_default"]),
        ("mail/c.yml --project given", &["given_default"]),
    ] {
        assert_eq!(networks(&agent, &folder, line), expected, "{line}");
    }
}

#[test]
fn variables_come_from_the_environment_before_files_of_which_the_last_wins() {
    let agent = Agent::start();
    let folder = folder(&[
        (
            "stack.yml",
            "name: s\nservices: {a: {image: a}}\nnetworks: {default: {name: '$A-$B-${C:-c}'}}",
        ),
        ("one.env", "A=one\nB=one\n"),
        ("two.env", "# x\nexport B=\"$A\"two\n"),
        ("good.env", "A=two\nB='two'\n"),
    ]);
    assert!(wrong(&folder, "stack.yml --env-file two.env").contains("two.env:2:1: something stands"));
    for (line, expected) in [
        ("stack.yml --env-file one.env", "one-one-env"),
        ("stack.yml --env-file one.env --env-file good.env", "two-two-env"),
    ] {
        let mut command = command(&agent.socket, &folder, &format!("{line} -o json"));
        let output = command.env("C", "env").output().unwrap();
        let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(verdict["networks"][0]["name"], expected);
        let output = command.env("A", "env").output().unwrap();
        assert!(text(&output.stdout).contains(&expected.replacen(&expected[..3], "env", 1)));
    }
}

#[test]
fn the_file_of_variables_beside_a_file_is_read_as_compose_does() {
    let agent = Agent::start();
    let file = "name: s\nservices: {a: {image: a}}\nnetworks: {default: {name: 'n-${A:-no}-${B:-no}'}}";
    let folder = folder(&[
        ("one/stack.yml", file),
        ("one/.env", "A=one\nB=one\n"),
        ("two/stack.yml", file),
        ("two/.env", "A=two\n"),
        ("none/stack.yml", file),
        ("given.env", "A=given\n"),
        ("wrong/stack.yml", file),
        ("wrong/.env", "not a name\n"),
        ("folder/stack.yml", file),
        ("folder/.env/x", ""),
    ]);
    for (line, expected) in [
        ("one/stack.yml two/stack.yml none/stack.yml", &["n-no-no", "n-one-one", "n-two-no"][..]),
        ("one/stack.yml --tool compose", &["n-one-one"]),
        ("one/stack.yml --tool stack", &["n-no-no"]),
        ("one/stack.yml --env-file given.env", &["n-given-no"]),
        ("one/stack.yml --env-file given.env --tool stack", &["n-given-no"]),
    ] {
        assert_eq!(networks(&agent, &folder, line), expected, "{line}");
    }
    let mut command = command(&agent.socket, &folder, "one/stack.yml");
    let output = command.env("A", "environment").output().unwrap();
    assert!(text(&output.stdout).contains("n-environment-one"), "{output:?}");
    let told = wrong(&folder, "wrong/stack.yml wrong/stack.yml");
    assert!(told.contains("wrong/.env:1:1: \"not a name\"") && told.contains("correct this"), "{told}");
    assert!(wrong(&folder, "folder/stack.yml").contains("folder/.env: cannot be read"));
}

#[test]
fn what_the_tools_take_differently_is_counted_as_the_one_that_is_named() {
    let agent = Agent::start();
    let folder = folder(&[
        (
            "s/stack.yml",
            "services:\n  a: {}\n  b: {network_mode: host}\n  c: {profiles: [debug]}\n  d: {profiles: [x]}\n",
        ),
        ("with/stack.yml", "services: {c: {profiles: [debug]}, a: {}}"),
        ("with/.env", "COMPOSE_PROFILES=other, debug\n"),
    ]);
    // Each that counts needs two.
    for (line, needed) in [
        ("s/stack.yml --tool stack", 8),
        ("s/stack.yml --tool compose", 2),
        ("s/stack.yml --tool compose --profile debug", 4),
        ("s/stack.yml --profile debug --profile x", 6),
        ("s/stack.yml --profile *", 6),
        ("with/stack.yml --tool compose", 4),
        ("with/stack.yml --profile other", 2),
    ] {
        let output = plan(&agent, &folder, &format!("{line} -o json"));
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(verdict["networks"][0]["needed"], needed, "{line}");
    }
    let told = wrong(&folder, "s/stack.yml");
    for place in
        ["3:21: services.b.network_mode", "4:17: services.c.profiles", "5:17: services.d.profiles"]
    {
        assert!(told.contains(&format!("s/stack.yml:{place}: docker compose")), "{place}: {told}");
    }
    assert!(
        told.contains("--tool compose or --tool stack") && told.contains("correct these 3"),
        "{told}"
    );
    let told = wrong(&folder, "s/stack.yml --tool stack --profile debug");
    assert!(told.contains("docker stack deploy knows no profiles"), "{told}");
    assert!(wrong(&folder, "s/stack.yml --tool other").contains("--tool"));
}

#[test]
fn a_file_can_come_from_the_standard_input() {
    let agent = Agent::start();
    let folder = folder(&[]);
    for (input, status) in [("services: {a: {image: a}}", 0), ("services: [", 2)] {
        let mut child = command(&agent.socket, &folder, "- --project p");
        let child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        let (shown, told) = (text(&output.stdout), text(&output.stderr));
        assert!(shown.contains("p_default") || told.contains("stdin:2:1: services[0]: "), "{output:?}");
    }
}

#[test]
fn a_file_without_end_is_refused() {
    let folder = folder(&[]);
    assert!(wrong(&folder, "/dev/zero").contains("/dev/zero: cannot be read: it is larger than 4 MiB"));
}
