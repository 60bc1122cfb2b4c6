//! What the kernel has, as text that can be compared.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use crate::agent::tail;
use crate::ebpf;
use crate::space::Space;

/// What is read of each namespace: what it is called, and the command that shows it.
///
/// What comes and goes by itself is left out: learned neighbours, nftables' counters, and what the
/// kernel adds for IPv6 once a link-local address has been found to be unique.
const VIEWS: [(&str, &str); 9] = [
    ("settings", "cd /proc/sys/net; grep . ipv4/ip_forward ipv6/conf/all/forwarding"),
    ("links", "ip -d link show"),
    ("addresses", "ip -o address show | grep -v ' fe80::'"),
    (
        "routes",
        "ip -4 route show table all | sort
         ip -6 route show table all | grep -v 'fe80::.* proto kernel\\|ff00::/8' | sort",
    ),
    ("rules", "ip -4 rule show; ip -6 rule show"),
    ("neighbours", "ip neighbour show nud permanent | sort"),
    ("fdb", "bridge fdb show | grep -v '^33:33:' | sort"),
    ("nftables", "nft -s list ruleset"),
    ("disciplines", "tc qdisc show"),
];

/// What follows it in a line is another for the same thing made anew: indexes, and what is random.
pub(crate) const PASSING: &str = " ~ ";

/// The state of a machine's own network namespace and of all that are named in its /run/netns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelState {
    views: BTreeMap<(String, &'static str), Vec<String>>,
}

impl KernelState {
    pub(crate) fn read(space: &Space) -> Self {
        let listed = space.enter(|| fs::read_dir("/run/netns").map(Iterator::collect::<Vec<_>>));
        let names = listed.unwrap_or_default().into_iter().flatten();
        let named = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut views = BTreeMap::new();
        read_into(&mut views, "host", space);
        views.extend(ebpf::maps(space).map(|(view, lines)| (("host".to_owned(), view), lines)));
        for name in named {
            let path = format!("/run/netns/{name}");
            if space.enter(|| is_namespace(&path)) {
                read_into(&mut views, &name, &space.at(&name, &path));
            } else {
                views.insert((name, "file"), vec!["not a namespace".to_owned()]);
            }
        }
        Self { views }
    }

    /// The lines in which two states differ, with the namespace and the view; empty: none.
    pub fn difference(&self, later: &Self) -> String {
        let mut text = String::new();
        let keys: std::collections::BTreeSet<_> = self.views.keys().chain(later.views.keys()).collect();
        for key in keys {
            let (old, new) = (self.lines(key), later.lines(key));
            let (namespace, view) = key;
            let mut note = |sign, line: &String| {
                text.push_str(&format!("{namespace} {view} {sign} {line}\n"));
            };
            old.iter().filter(|line| !new.contains(line)).for_each(|line| note('-', line));
            new.iter().filter(|line| !old.contains(line)).for_each(|line| note('+', line));
        }
        text
    }

    /// The same without what changes when a device is made anew: indexes, and what the kernel
    /// derives from a device's random Ethernet address.
    pub fn shape(&self) -> Self {
        let views = self.views.iter().map(|((name, view), lines)| {
            let mut lines: Vec<_> = lines.iter().filter_map(|line| shape(line)).collect();
            lines.sort();
            ((name.clone(), *view), lines)
        });
        Self { views: views.collect() }
    }

    /// The same without some lines.
    #[must_use]
    pub fn without(mut self, unwanted: impl Fn(&str) -> bool) -> Self {
        self.views.values_mut().for_each(|lines| lines.retain(|line| !unwanted(line)));
        self
    }

    /// The names of the namespaces in /run/netns.
    pub fn namespaces(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.views.keys().map(|(name, _)| name.as_str()).collect();
        names.dedup();
        names.retain(|name| *name != "host");
        names
    }

    /// One view of one namespace (`host`: the machine's own).
    pub fn view(&self, namespace: &str, view: &str) -> String {
        let found = self.views.iter().find(|((name, kind), _)| name == namespace && *kind == view);
        found.map(|(_, lines)| lines.join("\n")).unwrap_or_default()
    }

    fn lines(&self, key: &(String, &'static str)) -> &[String] {
        self.views.get(key).map_or(&[], Vec::as_slice)
    }
}

impl fmt::Display for KernelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((namespace, view), lines) in &self.views {
            writeln!(f, "---- {namespace}: {view}")?;
            lines.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        }
        Ok(())
    }
}

/// A line as it would be for the same device made anew; `None`: it would be another.
fn shape(line: &str) -> Option<String> {
    if line.contains("link/ether") {
        return None;
    }
    // `7: eth0@if3: <…> … link-netnsid 2`
    let line = match line.split_once(": ") {
        Some((index, rest)) if index.parse::<u32>().is_ok() => rest,
        _ => line,
    };
    let line = line.split(" link-netnsid ").next().unwrap_or_default();
    let line = line.split(PASSING).next().unwrap_or_default();
    Some(match line.split_once("@if") {
        Some((name, rest)) => format!("{name}{}", rest.trim_start_matches(|c: char| c.is_ascii_digit())),
        None => line.to_owned(),
    })
}

fn is_namespace(path: &str) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|data| data.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

fn read_into(views: &mut BTreeMap<(String, &'static str), Vec<String>>, name: &str, space: &Space) {
    const MARK: &str = "----next----";
    let script: Vec<_> = VIEWS.iter().map(|(_, command)| *command).collect();
    let output = space.try_sh(&format!("set +e\n{}", script.join(&format!("\necho {MARK}\n"))));
    for ((view, _), text) in VIEWS.iter().zip(output.stdout.split(&format!("{MARK}\n"))) {
        let lines = text.lines().map(|line| line.trim_end().to_owned()).collect();
        views.insert((name.to_owned(), view), lines);
    }
    let links = views.get(&(name.to_owned(), "links")).map_or(&[][..], Vec::as_slice);
    let programs = ebpf::attached(space, links.iter().filter_map(|line| device(line)));
    views.insert((name.to_owned(), "programs"), programs);
}

/// The device of a line such as `7: eth0@if3: <…> …`.
fn device(line: &str) -> Option<&str> {
    let (index, rest) = line.split_once(": ")?;
    index.parse::<u32>().ok()?;
    rest.split([':', '@']).next()
}

/// The ends of all logs below a folder.
pub(crate) fn logs(dir: &Path) -> String {
    let mut text = String::new();
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            text.push_str(&logs(&path));
        } else if path.extension().is_some_and(|extension| extension == "log") {
            text.push_str(&format!("======== end of {}\n{}\n", path.display(), tail(&path, 60)));
        }
    }
    text
}
