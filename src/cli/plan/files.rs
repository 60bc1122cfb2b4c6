//! The files of a plan: what is in them, and what their stacks are called.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Arguments, Deployer};
use crate::cli::failure::{Exit, Failure, complain};
use crate::plan::Problem;
use crate::plan::compose::{self, MAX_BYTES, Stack, StackName, Tool};
use crate::plan::variables::{self, Variables};

/// The name of the standard input, as a file and in messages.
const STDIN: (&str, &str) = ("-", "stdin");

/// Reads the stacks of all files.
///
/// # Errors
/// What is wrong in any of them; all of it is told.
pub(super) fn stacks(arguments: &Arguments) -> Result<Vec<Stack>, Failure> {
    let files = &arguments.files;
    if arguments.project.is_some() && files.len() > 1 {
        let message = "--project names one stack: give one FILE with it";
        return Err(Failure::new(Exit::Usage, message));
    }
    if files.iter().filter(|file| is_stdin(file)).count() > 1 {
        return Err(Failure::new(Exit::Usage, "the standard input can be given once only"));
    }
    if arguments.tool == Some(Deployer::Stack) && !arguments.profiles.is_empty() {
        let message = "docker stack deploy knows no profiles: leave out --profile or --tool stack";
        return Err(Failure::new(Exit::Usage, message));
    }
    let mut wrong = Wrong(0);
    let mut variables = Source::new(arguments, &mut wrong);
    let folders: Vec<PathBuf> = files.iter().map(|file| folder(file)).collect();
    let mut stacks = Vec::new();
    for (file, folder) in files.iter().zip(&folders) {
        let alone = folders.iter().filter(|other| *other == folder).count() == 1;
        let fallback = if alone { folder.file_name() } else { path(file).file_stem() };
        let fallback = fallback.unwrap_or_default().to_string_lossy();
        let name = match &arguments.project {
            Some(project) => StackName::Given(project),
            None => StackName::OrElse(&fallback),
        };
        let variables = variables.of(file, folder, &mut wrong);
        let tool = tool(arguments, variables);
        let Some(text) = wrong.read(file) else { continue };
        stacks.extend(wrong.take(compose::read(&text, &shown(file), name, variables, &tool)));
    }
    wrong.end().map(|()| stacks)
}

/// What deploys a file with these variables.
fn tool(arguments: &Arguments, variables: &Variables) -> Tool {
    match arguments.tool {
        None if arguments.profiles.is_empty() => Tool::Any,
        Some(Deployer::Stack) => Tool::Stack,
        None | Some(Deployer::Compose) if !arguments.profiles.is_empty() => {
            Tool::Compose { profiles: arguments.profiles.iter().cloned().collect() }
        }
        None | Some(Deployer::Compose) => {
            let active = variables.get("COMPOSE_PROFILES").into_iter().flat_map(|all| all.split(','));
            let active = active.map(str::trim).filter(|profile| !profile.is_empty());
            Tool::Compose { profiles: active.map(str::to_owned).collect() }
        }
    }
}

/// Where variables come from.
enum Source {
    /// The same for all files.
    Given(Variables),
    /// The file `.env` in each file's folder.
    Beside(BTreeMap<PathBuf, Variables>),
}

impl Source {
    fn new(arguments: &Arguments, wrong: &mut Wrong) -> Self {
        if arguments.env_files.is_empty() && arguments.tool != Some(Deployer::Stack) {
            Self::Beside(BTreeMap::new())
        } else {
            Self::Given(read_variables(&arguments.env_files, wrong))
        }
    }

    /// The variables of a file in a folder.
    fn of(&mut self, file: &Path, folder: &Path, wrong: &mut Wrong) -> &Variables {
        match self {
            Self::Given(variables) => variables,
            Self::Beside(known) => known.entry(folder.to_owned()).or_insert_with(|| {
                let beside = path(file).with_file_name(".env");
                // What is there and cannot be read is told.
                let there = fs::symlink_metadata(&beside).is_ok();
                read_variables(if there { std::slice::from_ref(&beside) } else { &[] }, wrong)
            }),
        }
    }
}

/// The variables of the files, later ones first, and of the environment before all.
fn read_variables(files: &[PathBuf], wrong: &mut Wrong) -> Variables {
    let text = |text: std::ffi::OsString| text.into_string().ok();
    let environment = std::env::vars_os();
    let environment: Variables =
        environment.filter_map(|(name, value)| Some((text(name)?, text(value)?))).collect();
    let mut variables = Variables::new();
    for file in files {
        if let Some(text) = wrong.read(file) {
            let found = variables::read_file(&text, &shown(file), &environment);
            variables.extend(wrong.take(found).unwrap_or_default());
        }
    }
    variables.extend(environment);
    variables
}

/// How much was wrong, of which all was told.
struct Wrong(usize);

impl Wrong {
    fn tell(&mut self, message: &str) {
        self.0 += 1;
        complain(message);
    }

    fn take<T>(&mut self, result: Result<T, Vec<Problem>>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(problems) => {
                problems.iter().for_each(|problem| self.tell(&problem.to_string()));
                None
            }
        }
    }

    /// The text of a file.
    fn read(&mut self, file: &Path) -> Option<String> {
        match read(file) {
            Ok(text) => Some(text),
            Err(error) => {
                self.tell(&format!("{}: cannot be read: {error}", shown(file)));
                None
            }
        }
    }

    fn end(self) -> Result<(), Failure> {
        match self.0 {
            0 => Ok(()),
            1 => Err(Failure::new(Exit::Usage, "nothing is planned: correct this first")),
            more => {
                let message = format!("nothing is planned: correct these {more} first");
                Err(Failure::new(Exit::Usage, message))
            }
        }
    }
}

fn read(file: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    // One byte more tells that there are more.
    let limit = MAX_BYTES as u64 + 1;
    if is_stdin(file) {
        io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else {
        File::open(file)?.take(limit).read_to_end(&mut bytes)?;
    }
    if bytes.len() > MAX_BYTES {
        return Err(io::Error::other(format!("it is larger than {} MiB", MAX_BYTES >> 20)));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not a text in UTF-8"))
}

fn is_stdin(file: &Path) -> bool {
    file == Path::new(STDIN.0)
}

fn path(file: &Path) -> &Path {
    if is_stdin(file) { Path::new(STDIN.1) } else { file }
}

fn shown(file: &Path) -> String {
    path(file).display().to_string()
}

/// The folder in which a file is; that of the standard input is where the command runs.
fn folder(file: &Path) -> PathBuf {
    let parent = path(file).parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    fs::canonicalize(parent).unwrap_or_else(|_| parent.to_owned())
}
