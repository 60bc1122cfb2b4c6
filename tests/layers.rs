//! The layers hold, files stay readable, and nothing names the machine it was written on.
//!
//! A module uses only what stands below it, and the pure ones know no clock, no socket, no file
//! and no kernel. What is said about a module's tests does not count: they may reach further.

#![allow(clippy::expect_used, clippy::panic, reason = "a check that cannot read the sources has failed")]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules, lowest first, with what each may use.
const LAYERS: [(&str, &[&str]); 14] = [
    ("model", &[]),
    ("ipam", &["model"]),
    ("plan", &["model", "ipam"]),
    ("lb", &["model"]),
    ("dns", &["model", "lb"]),
    ("overlay", &["model", "lb"]),
    ("reconcile", &["model"]),
    ("store", &["model", "ipam", "lb", "overlay", "reconcile"]),
    ("kernel", &["model", "ipam", "lb", "overlay", "reconcile"]),
    ("api", &["model", "ipam", "lb", "overlay", "reconcile"]),
    ("config", &["model", "ipam", "lb", "dns", "overlay", "reconcile"]),
    ("cluster", &["model", "ipam", "lb", "overlay", "reconcile", "store"]),
    (
        "app",
        &[
            "model",
            "ipam",
            "lb",
            "dns",
            "overlay",
            "reconcile",
            "store",
            "kernel",
            "api",
            "config",
            "cluster",
        ],
    ),
    ("cli", &["model", "plan", "api", "config"]),
];

/// The modules that decide without doing.
const PURE: [&str; 7] = ["model", "ipam", "plan", "lb", "dns", "overlay", "reconcile"];

/// What the pure modules must not name, as whole words or paths.
const IMPURE: [&str; 27] = [
    "tokio",
    "nix",
    "libc",
    "rtnetlink",
    "netlink_packet_core",
    "netlink_packet_generic",
    "netlink_packet_netfilter",
    "netlink_packet_route",
    "netlink_packet_sock_diag",
    "aya",
    "netlink_sys",
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "File",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixListener",
    "UnixDatagram",
    "Instant::now",
    "SystemTime::now",
    "rand::rng",
    "rand::random",
    "thread_rng",
];

/// The longest file that can be read in one sitting.
const LINES: usize = 600;

/// Folders of somebody's machine.
const MACHINES: [&str; 4] =
    [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/")];

#[test]
fn a_module_uses_only_what_stands_below_it() {
    let mut problems = String::new();
    for (path, text) in sources("src", &["rs"]) {
        let module = top_module(&path);
        if module == "lib" || module == "bin" || is_test(&path) {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            let _ = writeln!(problems, "{}: module {module} has no layer yet", path.display());
            continue;
        };
        for (line, used) in uses(&path, &text) {
            if used != module && !allowed.contains(&used.as_str()) {
                let path = path.display();
                let _ = writeln!(problems, "{path}:{line}: {module} must not use {used}");
            }
        }
    }
    assert!(problems.is_empty(), "the layers are broken:\n{problems}");
}

#[test]
fn pure_modules_know_no_clock_socket_file_or_kernel() {
    let mut problems = String::new();
    for (path, text) in sources("src", &["rs"]) {
        if !PURE.contains(&top_module(&path).as_str()) || is_test(&path) {
            continue;
        }
        for (line, word) in impurities(&text) {
            let _ = writeln!(problems, "{}:{line}: a pure module names {word}", path.display());
        }
    }
    assert!(problems.is_empty(), "pass it in as an argument instead:\n{problems}");
}

#[test]
fn no_file_is_too_long_to_read() {
    let mut problems = String::new();
    for folder in ["src", "tests", "netns-tests", "scripts"] {
        for (path, text) in sources(folder, &["rs", "sh", ""]) {
            let lines = text.lines().count();
            if lines > LINES {
                let _ = writeln!(problems, "{}:{LINES}: {lines} lines", path.display());
            }
        }
    }
    assert!(problems.is_empty(), "split these by topic:\n{problems}");
}

#[test]
fn no_source_names_the_machine_it_was_written_on() {
    let mut problems = String::new();
    for (path, text) in sources(".", &["rs", "sh", "toml", "md", "service", "yml", ""]) {
        for (number, line) in text.lines().enumerate() {
            if let Some(folder) = MACHINES.iter().find(|folder| line.contains(**folder)) {
                let _ = writeln!(problems, "{}:{}: {folder}", path.display(), number + 1);
            }
        }
    }
    assert!(problems.is_empty(), "use relative paths:\n{problems}");
}

#[test]
fn a_test_program_with_a_main_of_its_own_is_declared_so() {
    for folder in [".", "netns-tests"] {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join("Cargo.toml");
        let manifest = fs::read_to_string(&manifest).expect("the manifest can be read");
        for (path, text) in sources(&format!("{folder}/tests"), &["rs"]) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let parent = path.parent().and_then(Path::file_name).unwrap_or_default();
            let name = if name == "main" { parent.to_string_lossy().into_owned() } else { name };
            // Without this the built-in harness would run instead, and find no test.
            let declared = manifest.split("[[test]]").any(|part| {
                part.contains(&format!("name = {name:?}")) && part.contains("harness = false")
            });
            let own = text.lines().any(|line| line.starts_with("fn main("));
            assert!(!own || declared, "{}: harness = false is missing in Cargo.toml", path.display());
        }
    }
}

/// All text files below a folder of the repository with one of these extensions.
fn sources(folder: &str, extensions: &[&str]) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for path in entries.map(|entry| entry.expect("the folder can be read").path()) {
            let name = path.file_name().unwrap_or_default();
            if name == "target" || name == ".git" {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let extension = path.extension().unwrap_or_default().to_string_lossy();
            if extensions.contains(&extension.as_ref())
                && let Ok(text) = fs::read_to_string(&path)
            {
                let relative = path.strip_prefix(root.join(".")).unwrap_or(&path);
                found.push((relative.to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The module below the crate's root to which a file belongs.
fn top_module(path: &Path) -> String {
    let part = path.strip_prefix("src").unwrap_or(path).components().next();
    let part = part.map(|part| part.as_os_str().to_string_lossy().into_owned()).unwrap_or_default();
    part.trim_end_matches(".rs").to_owned()
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| matches!(part.as_os_str().to_str(), Some("tests" | "tests.rs")))
}

/// The code without its comments and its unit tests; lines keep their numbers.
fn code(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines().take_while(|line| line.trim() != "#[cfg(test)]") {
        code.push_str(line.split("//").next().unwrap_or_default());
        code.push('\n');
    }
    code
}

/// The crate's modules that a file names, with the line.
fn uses(path: &Path, text: &str) -> Vec<(usize, String)> {
    let code = code(text);
    // `super` as often as a file is deep means the crate's root.
    let depth = path.strip_prefix("src").unwrap_or(path).components().count();
    let mut found = Vec::new();
    for prefix in ["crate::".to_owned(), "super::".repeat(depth)] {
        for (start, _) in code.match_indices(&prefix) {
            if code[..start].ends_with(|c: char| c == ':' || is_word(c)) {
                continue;
            }
            let line = code[..start].matches('\n').count() + 1;
            let rest = &code[start + prefix.len()..];
            let names = first_names(rest);
            let known = |name: &String| LAYERS.iter().any(|(layer, _)| layer == name);
            found.extend(names.into_iter().filter(known).map(|name| (line, name)));
        }
    }
    found
}

/// The first names of a path or of each path in braces.
fn first_names(rest: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| is_word(*c)).collect::<String>();
    let Some(inner) = rest.strip_prefix('{') else { return vec![word(rest)] };
    let (mut depth, mut names, mut item) = (0, Vec::new(), String::new());
    for c in inner.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => names.push(word(std::mem::take(&mut item).trim())),
            '{' => depth += 1,
            '}' => depth -= 1,
            _ if depth == 0 => item.push(c),
            _ => {}
        }
    }
    names.push(word(item.trim()));
    names
}

/// The words that a pure module must not name, with the line.
fn impurities(text: &str) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    for (number, line) in code(text).lines().enumerate() {
        for word in IMPURE {
            let named = line.match_indices(word).any(|(start, _)| {
                let (before, after) = (&line[..start], &line[start + word.len()..]);
                !before.ends_with(is_word) && !after.starts_with(is_word)
            });
            if named {
                found.push((number + 1, word));
            }
        }
    }
    found
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[test]
fn every_way_to_name_a_module_is_seen() {
    let text = "use crate::kernel::link;\nuse crate::{\n    model::{Name, Vni},\n    store,\n};\n\
                fn f() { crate::api::serve(); super::super::cluster::join(); super::other(); }\n\
                // crate::app is only talked about\n#[cfg(test)]\nuse crate::cli;\n";
    let found = uses(Path::new("src/overlay/firewall.rs"), text);
    let expected = [(1, "kernel"), (2, "model"), (2, "store"), (6, "api"), (6, "cluster")];
    assert_eq!(found, expected.map(|(line, name)| (line, name.to_owned())));
}

#[test]
fn every_impure_word_is_seen_and_no_other() {
    let text = "use std::{fmt, net::IpAddr};\nlet unix = 1; // tokio\nlet now = Instant::now();\n\
                use tokio::sync::mpsc;\nlet phoenix = nix::unistd::getpid();\n\
                #[cfg(test)]\nmod tests { fn f() { rand::rng(); } }\n";
    assert_eq!(impurities(text), [(3, "Instant::now"), (4, "tokio"), (5, "nix")]);
}
