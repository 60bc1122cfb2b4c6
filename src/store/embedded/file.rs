//! The durable image of an embedded store: a redb file with three tables.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::content::{FIRST_REVISION, Loaded, Step, Stored};
use crate::store::StoreError;

/// Key -> revision that wrote it, lease (0: none), value.
const ENTRIES: TableDefinition<&str, (u64, i64, &[u8])> = TableDefinition::new("entries");
/// Lease -> its time in seconds.
const LEASES: TableDefinition<i64, u64> = TableDefinition::new("leases");
/// `revision` and `format`.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// The form of the tables above.
const FORMAT: u64 = 1;

/// redb's page cache. Reads come from memory, so it only has to help writes.
const CACHE_BYTES: usize = 4 << 20;

/// Why a step was not written.
pub(super) struct WriteError {
    pub(super) reason: String,
    /// There is no room on the disk.
    pub(super) full: bool,
}

/// The open, locked file.
pub(super) struct Image {
    database: Database,
}

impl Image {
    /// Opens or creates the file (mode 0600), locks it and reads all of it.
    pub(super) fn open(path: &Path) -> Result<(Self, Loaded), StoreError> {
        let error = |reason: String| StoreError::Open { path: path.to_owned(), reason };
        let existed = path.exists();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(|e| error(e.to_string()))?;
        // redb trusts a file whose header looks right and may panic on one whose rest does not.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = redb::Builder::new().set_cache_size(CACHE_BYTES).create_file(file)?;
            let loaded = load(&database)?;
            Ok((database, loaded))
        }));
        let (database, loaded) = match opened {
            Ok(opened) => opened.map_err(|e| error(explain(&e)))?,
            Err(_) => return Err(error("the file is damaged: restore it from a copy".to_owned())),
        };
        if !existed {
            sync_folder(path).map_err(|e| error(e.to_string()))?;
        }
        let (format, loaded) = loaded;
        if format > FORMAT {
            let (found, known) = (u32::try_from(format).unwrap_or(u32::MAX), FORMAT as u32);
            return Err(StoreError::Newer { store: path.display().to_string(), found, known });
        }
        Ok((Self { database }, loaded))
    }

    /// Writes a step and waits until it is on the disk. After an error the image must be opened
    /// again: redb refuses everything until then.
    pub(super) fn write(&self, step: &Step) -> Result<(), WriteError> {
        self.try_write(step)
            .map_err(|error| WriteError { reason: explain(&error), full: is_full(&error) })
    }

    /// Gives back to the disk what the file does not need. After an error the image must be
    /// opened again.
    pub(super) fn compact(&mut self) -> Result<(), String> {
        self.database.compact().map(drop).map_err(|e| e.to_string())
    }

    fn try_write(&self, step: &Step) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut entries = transaction.open_table(ENTRIES)?;
            for (key, stored) in &step.entries {
                match stored {
                    Some(Stored { value, modified, lease }) => {
                        entries.insert(&**key, (*modified, lease.unwrap_or(0), &**value))?;
                    }
                    None => drop(entries.remove(&**key)?),
                }
            }
            let mut leases = transaction.open_table(LEASES)?;
            for (id, ttl) in &step.leases {
                match ttl {
                    Some(ttl) => leases.insert(id, ttl.as_secs())?,
                    None => leases.remove(id)?,
                };
            }
            transaction.open_table(META)?.insert("revision", step.revision)?;
        }
        Ok(transaction.commit()?)
    }
}

/// Reads everything, and makes the tables in a file that has none.
fn load(database: &Database) -> Result<(u64, Loaded), redb::Error> {
    let transaction = database.begin_read()?;
    if transaction.list_tables()?.next().is_none() {
        let transaction = database.begin_write()?;
        {
            transaction.open_table(ENTRIES)?;
            transaction.open_table(LEASES)?;
            let mut meta = transaction.open_table(META)?;
            meta.insert("format", FORMAT)?;
            meta.insert("revision", FIRST_REVISION)?;
        }
        transaction.commit()?;
        return Ok((FORMAT, Loaded { revision: FIRST_REVISION, ..Loaded::default() }));
    }
    let meta = transaction.open_table(META)?;
    let number = |name| {
        let value = meta.get(name)?.map(|guard| guard.value());
        value.ok_or_else(|| redb::Error::Corrupted(format!("it has no {name}")))
    };
    let format = number("format")?;
    let mut loaded = Loaded { revision: number("revision")?, ..Loaded::default() };
    if format > FORMAT {
        return Ok((format, loaded));
    }
    for row in transaction.open_table(ENTRIES)?.iter()? {
        let (key, row) = row?;
        let (modified, lease, value) = row.value();
        let stored = Stored { value: value.into(), modified, lease: (lease != 0).then_some(lease) };
        loaded.entries.insert(key.value().into(), stored);
    }
    for row in transaction.open_table(LEASES)?.iter()? {
        let (id, ttl) = row?;
        loaded.leases.insert(id.value(), Duration::from_secs(ttl.value()));
    }
    Ok((format, loaded))
}

/// Makes the name of a new file durable.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.map_or_else(|| PathBuf::from("."), Path::to_owned))?.sync_all()
}

fn is_full(error: &redb::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error, redb::Error::Io(e) if matches!(e.kind(), StorageFull | QuotaExceeded))
}

fn explain(error: &redb::Error) -> String {
    match error {
        redb::Error::DatabaseAlreadyOpen => {
            "another process has it open: is netctld running already?".to_owned()
        }
        redb::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            format!("it is not a netctl store ({e})")
        }
        redb::Error::Io(e) => e.to_string(),
        other => other.to_string(),
    }
}
