//! Reading many Compose files and judging what they need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use netctl::model::Subnet;
use netctl::plan::compose::{self, Stack, StackName, Tool};
use netctl::plan::demand::demands;
use netctl::plan::variables::Variables;
use netctl::plan::verdict::{PoolSubnet, Pools, Stocks, Verdict, judge, stocks};

use crate::report::{Better, Metric, Report};
use crate::{Ground, progress};

pub const HELP: &str = "\
1,000 Compose files of 10 services: time to read and judge them, without an agent

Writes 1,000 Compose files with 10 services each to a folder, with anchors, merge keys and
variables, as stacks have them. All are on one external network, each has one of its own. What is
measured is what `netctl plan` does with them beside asking the agent: read the files, count what is
needed, judge it. The best of 5 rounds (--quick: 2) counts; the goal is less than a second.

  plan_s   all files";

/// Removed with the other files of the benchmarks.
const FOLDER: &str = "/run/world/plan";
const FILES: usize = 1000;
const SERVICES: usize = 10;
/// Nodes that the global services run on.
const NODES: u32 = 100;
/// On the external network: for each stack 9 × (4 replicas + 2 more while they are replaced + 1 of
/// the service's), and of the global service one for each node and one of the service's.
const NEEDED: u64 = FILES as u64 * (9 * (4 + 2 + 1) + NODES as u64 + 1);

pub fn run(ground: &Ground) -> Report {
    let files = write(Path::new(FOLDER));
    let known = BTreeMap::from([("shared".to_owned(), shared())]);
    let mut best = Duration::MAX;
    for round in 1..=ground.pick(5, 2) {
        let start = Instant::now();
        let verdict = plan(&files, &known);
        let took = start.elapsed();
        progress(&format!("round {round}: {took:.2?}"));
        assert_eq!(verdict.networks.len(), FILES + 1);
        let shared = verdict.networks.iter().find(|network| network.name == "shared");
        assert_eq!(shared.map(|network| network.needed), Some(NEEDED));
        best = best.min(took);
    }
    let what = format!("plan of {FILES} files, {SERVICES} services each, s");
    let metric = Metric::single("plan_s", &what, Better::Lower, best.as_secs_f64());
    Report { metrics: vec![metric] }
}

fn plan(files: &[PathBuf], known: &BTreeMap<String, Stocks>) -> Verdict {
    let variables = Variables::from([("TAG".to_owned(), "1.2".to_owned())]);
    let stacks: Vec<Stack> = files.iter().map(|file| read(file, &variables)).collect();
    let pool = |prefix| PoolSubnet { prefix, assumed: false };
    judge(demands(&stacks, NODES), known, &Pools { ipv4: pool(24), ipv6: pool(64) })
}

fn read(file: &Path, variables: &Variables) -> Stack {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    compose::read(&text, &file.display().to_string(), StackName::OrElse(&name), variables, &Tool::Any)
        .unwrap_or_else(|problems| panic!("{}", problems[0]))
}

/// What the external network has.
fn shared() -> Stocks {
    let cidr = "10.64.0.0/10".parse().expect("a subnet");
    stocks([&Subnet::new(cidr, None, None, Default::default()).expect("a subnet")])
}

fn write(folder: &Path) -> Vec<PathBuf> {
    let text = stack();
    fs::create_dir_all(folder).expect("the folder can be made");
    progress(&format!("{FILES} files of {} bytes", text.len()));
    let paths = (0..FILES).map(|number| folder.join(format!("stack-{number}.yml")));
    paths.inspect(|path| fs::write(path, &text).expect("the folder can be written")).collect()
}

/// A file as stacks have them: most of it says nothing about addresses.
fn stack() -> String {
    let mut text = "\
x-logging: &logging
  driver: json-file
  options: {max-size: 10m, max-file: '3'}
x-deploy: &deploy
  replicas: ${REPLICAS:-4}
  update_config: &update
    order: start-first
    parallelism: 2
    failure_action: rollback
  restart_policy: {condition: any, delay: 5s}
services:
"
    .to_owned();
    for number in 0..SERVICES {
        let deploy = match number {
            0 => "      mode: global\n",
            _ => "      <<: *deploy\n",
        };
        text.push_str(&format!(
            "  service-{number}:
    image: registry.example/app-{number}:${{TAG:?}}
    command: [\"serve\", \"--port\", \"80{number:02}\"]
    environment:
      PASSWORD: ${{PASSWORD}}
      URL: http://service-{number}:80
    logging: *logging
    networks: [default, shared]
    deploy:
{deploy}      labels:
        - traefik.enable=true
        - traefik.http.routers.service-{number}.rule=Host(`service-{number}.example`)
      resources:
        limits: {{cpus: '0.50', memory: 512M}}
    volumes:
      - data-{number}:/var/lib/data
    healthcheck:
      test: [\"CMD\", \"curl\", \"-f\", \"http://localhost\"]
      interval: 10s
"
        ));
    }
    text.push_str("networks:\n  shared: {external: true}\n  default: {attachable: true}\n");
    text
}
